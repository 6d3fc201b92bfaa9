"""How fast GenEval's judges look at an image, and how much memory they take: networks of the published sizes with
random weights, which cost as much as trained ones.

    python -m benchmarks.scorer [--images 4] [--size 512] [--threads 2] [--device cpu]
"""

import argparse
import platform
import resource
import sys
import time

import numpy as np
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--size", type=int, default=512, help="pixels on a side of an image")
    parser.add_argument("--objects", type=int, default=1, help="crops of an image whose colours are asked for")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("$ python -m benchmarks.scorer", *sys.argv[1:])
    print(f"torch {torch.__version__}, {processor(args.device)}, {args.threads} threads")

    from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    from pixelgen.metrics.colors import ClipColors
    from pixelgen.metrics.detector import SWIN_S, Mask2Former

    device = torch.device(args.device)
    detector = Mask2Former(Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**SWIN_S)).eval().to(device),
                           "random", device)
    shape = {"text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
             "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                               "num_attention_heads": 16, "patch_size": 14}}
    colors = ClipColors(CLIPModel(CLIPConfig(**shape, projection_dim=768)).eval().to(device), Words(), "random", device)
    image = np.random.default_rng(0).integers(0, 256, (args.size, args.size, 3), dtype=np.uint8)
    boxes = np.array([[0, 0, args.size // 2, args.size // 2, 1]] * args.objects, np.float32)
    masks = np.ones((args.objects, args.size, args.size), bool)
    print(f"networks loaded: {memory(device):.2f} GB")
    for name, look in (("detector", lambda: detector(image)), ("colours", lambda: colors(image, "cup", boxes, masks))):
        look()  # buffers, and the descriptions of a class, are made once
        start = time.perf_counter()
        for _ in range(args.images):
            look()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = (time.perf_counter() - start) / args.images
        print(f"{name}: {seconds:.2f} s an image of {args.size}×{args.size} ({1 / seconds:.2f} images/s), "
              f"peak so far {memory(device):.2f} GB")


class Words:
    """In place of the tokenizer: thirty descriptions of ten words, all the same."""

    def __call__(self, texts: list[str], **_: object) -> "Words":
        self.tokens = {"input_ids": torch.tensor([[49406, *range(320, 330), 49407]] * len(texts))}
        return self

    def to(self, device: torch.device) -> dict[str, torch.Tensor]:
        return {name: value.to(device) for name, value in self.tokens.items()}


def memory(device: torch.device) -> float:
    """Peak so far in GB: of the device if it is a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def processor(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as file:
        return next((line.split(": ")[1].strip() for line in file if line.startswith("model name")),
                    platform.processor())


if __name__ == "__main__":
    main()
