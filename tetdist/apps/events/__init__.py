"""Conversion of event-camera recordings to the tensors that training reads."""
