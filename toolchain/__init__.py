"""The line from a trained model to an artifact: everything that happens before an engine is shipped."""
