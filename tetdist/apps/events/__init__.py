"""Recordings of event cameras, and the tensors that training reads."""
