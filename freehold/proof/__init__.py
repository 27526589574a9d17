"""Keys, signatures and the append-only log: what a stranger needs to check a release; never torch.

`keys` makes and reads keys, `bundle` signs a folder in OpenSSF's model-signing format, `keyring` says which keys a root
trusts and from which log index to which, `log` is the Merkle tree that checkpoints and releases are anchored in.
"""
