"""What other people's programs take: ONNX, torch.export, spandrel, ComfyUI, a page."""
