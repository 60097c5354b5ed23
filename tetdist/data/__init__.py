"""From files to batches: the index of a data set, the order of its samples, DALI pipelines.

All but pipeline.py need numpy alone (and PIL to look into images, scipy to read ImageNet's devkit);
only pipeline.py knows torch and DALI.
"""
