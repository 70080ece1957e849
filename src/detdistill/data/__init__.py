"""Data sets: COCO folders and generated ones, read, checked and turned into batches.

`open_dataset` reads and checks a split, `make_train_batches` and `make_eval_batches` turn it into
`Batch` records, `generate_dataset` draws a data set without downloads. All geometry is in
`transforms`.
"""

from detdistill.data.coco import DetectionDataset, ImageRecord, open_dataset, require_same_classes
from detdistill.data.eval_loader import EvalBatches, make_eval_batches
from detdistill.data.images import read_image
from detdistill.data.loader import TrainBatches, make_train_batches
from detdistill.data.synthetic import generate_dataset

__all__ = [
    "DetectionDataset",
    "EvalBatches",
    "ImageRecord",
    "TrainBatches",
    "generate_dataset",
    "make_eval_batches",
    "make_train_batches",
    "open_dataset",
    "read_image",
    "require_same_classes",
]
