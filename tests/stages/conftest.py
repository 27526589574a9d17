from __future__ import annotations

from gather_fixtures import site

__all__ = ["site"]
