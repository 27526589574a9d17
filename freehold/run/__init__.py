"""Everything about a run folder: recipe, walk, trace, take-down, lineage, documents about the data, report."""
