"""Training: arguments, reference pass, loss and trainer."""
