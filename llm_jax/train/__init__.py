"""Training: state, optimizer, objectives, the jitted step, the loop around it, the documents' study."""
