"""Data sets: COCO, YOLO and Pascal VOC folders and generated ones, read, checked and batched.

`open_dataset` reads and checks a split of any format, `make_train_batches` and `make_eval_batches`
turn it into `Batch` records, `generate_dataset` draws a data set without downloads,
`write_coco_folder` writes any as a COCO folder. All geometry is in `transforms`.
"""

from detdistill.data.dataset import (
    DetectionDataset,
    ImageRecord,
    MissingSplitError,
    require_same_classes,
)
from detdistill.data.eval_loader import EvalBatches, make_eval_batches
from detdistill.data.export import write_coco_folder
from detdistill.data.images import read_image
from detdistill.data.loader import TrainBatches, make_train_batches
from detdistill.data.splits import open_dataset
from detdistill.data.synthetic import generate_dataset

__all__ = [
    "DetectionDataset",
    "EvalBatches",
    "ImageRecord",
    "MissingSplitError",
    "TrainBatches",
    "generate_dataset",
    "make_eval_batches",
    "make_train_batches",
    "open_dataset",
    "read_image",
    "require_same_classes",
    "write_coco_folder",
]
