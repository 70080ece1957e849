"""From a trained detector to a checked ONNX file that runs without PyTorch."""

from detdistill.export.onnx_file import Exported, export_onnx

__all__ = ["Exported", "export_onnx"]
