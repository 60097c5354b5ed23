"""Preparation of image data sets: checks, shards, extraction from archives, copies on a host."""
