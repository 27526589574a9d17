"""Documents to rewritten documents: a teacher model says again what a document says, and checks judge it."""
