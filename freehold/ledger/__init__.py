"""What we may use and where it went: licences, the gate, trace, lineage. Never imports torch."""
