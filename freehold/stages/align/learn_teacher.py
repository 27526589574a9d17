"""Sets up phases of kind distill: the teacher, its terms, and the rows that are imitated."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from freehold.checkpoint import dcp
from freehold.core.artifact import Workspace, read_manifest
from freehold.core.errors import CheckpointError, LicenceError
from freehold.ledger.policy import Policy, judge
from freehold.stages.align import forgetting
from freehold.stages.align.config import AlignConfig
from freehold.stages.align.rl_config import DistillConfig, TeacherConfig
from freehold.tokenizer.bpe import Tokenizer

WHERE = "align.phases.*.distill.teacher"


def check_terms(teacher: TeacherConfig, folder: Path, run_folder: Path) -> str:
    """Return the licence of a teacher; LicenceError, before anything is read from it, when it forbids to learn.

    A checkpoint of the same run has the terms of the run's own text.
    """
    if teacher.allows_training is False:
        raise LicenceError(
            "the teacher's terms forbid that a model learns from it",
            where=WHERE,
            found="allows_training: false",
            todo="take another teacher",
        )
    if folder.resolve().is_relative_to(run_folder.resolve()) and not teacher.licence:
        return ""
    if not teacher.licence or not teacher.licence_evidence:
        raise LicenceError(
            "the terms of the teacher are not known",
            where=WHERE,
            found=f"licence {teacher.licence or 'missing'}, evidence {teacher.licence_evidence or 'missing'}",
            expected="licence and licence_evidence, since the checkpoint is outside this run",
        )
    verdict = judge(teacher.licence, Policy(uses=("train", "distill")))
    if verdict.decision != "allow" and teacher.allows_training is not True:
        raise LicenceError(
            "the teacher's licence does not let a model learn from it",
            where=WHERE,
            found=f"{teacher.licence}: {verdict.reason}",
            todo="take another teacher, or set allows_training: true with the evidence for it",
        )
    return teacher.licence


class OpenTeacher:
    """A teacher ready to be asked for hidden states; of the same tokenizer as the student."""

    def __init__(self, settings: DistillConfig, config: AlignConfig, work: Workspace, tokenizer: Tokenizer) -> None:
        run_folder = work.input("tokenize").parent
        folder = run_folder / settings.teacher.checkpoint
        self.licence = check_terms(settings.teacher, folder, run_folder)
        facts = dcp.check(folder)
        if facts["tokenizer_sha256"] != tokenizer.sha256:
            raise CheckpointError(
                "the teacher has another tokenizer: its ids mean other text",
                where=folder,
                found=facts["tokenizer_sha256"][:16],
                expected=tokenizer.sha256[:16],
                todo="let it write text instead: `freehold rephrase`",
            )
        self.name = f"{settings.teacher.checkpoint}@{read_manifest(folder)['content_sha256'][:16]}"
        self.model = forgetting.open_for_use(folder, config.trainer.dtype)
        self.model.eval()

    def __call__(self, ids: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's hidden states [B, T, d] and its head [V, d]."""
        with torch.no_grad():
            self.model.to(ids.device)
            return self.model.hidden(ids, document_ids=documents), self.model.lm_head.weight
