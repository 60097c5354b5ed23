"""The way from files to batches: index, order of samples, augmentation, decoding by DALI.

index.py, order.py and transforms.py need numpy alone (and PIL to build an index); only dali.py
knows DALI.
"""
