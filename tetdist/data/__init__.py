"""From files to batches: the index of a data set, the order of its samples, DALI pipelines.

index.py, order.py and transforms.py need numpy alone (and PIL to build an index); only dali.py
knows DALI.
"""
