"""Export with a parity check, prediction with a trained model, and the HTTP server."""
