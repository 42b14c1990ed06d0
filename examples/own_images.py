"""Your images: a folder, a generator, the on-manifold set, a robust classifier, labels for new images. Without Ray.

For practitioners. Run it as a script, or cell by cell in an editor that knows "# %%".
"""

# %% Sizes: a minute or two on two cores
IMAGES, NEW, OUTPUT = "runs/own_images/photos", "runs/own_images/new", "runs/own_images"
A_CLASS, EPOCHS = 20, 8  # images of each class

# %% A folder with one sub-folder a class. Put yours there; here digits stand in for them
from pathlib import Path

from PIL import Image

from dmat_ray import evaluate, load_images, make_set, open_set, predict, settings, terminal_table, train

if not Path(IMAGES).is_dir():
    digits, names = load_images("mnist5k", "train", limit=10 * (A_CLASS + 2))
    held = {}
    for id, x, y in zip(digits.id, digits.x_BCHW, digits.y_B.tolist(), strict=True):
        held[y] = held.get(y, 0) + 1
        folder = Path(IMAGES) / names[y] if held[y] <= A_CLASS else Path(NEW)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((x[0] * 255).round().byte().numpy()).save(folder / f"{names[y]}-{id}.png")

# %% Settings: the demo's, with your images and a generator of their kind (docs/guide.md, Your generator)
config = settings(
    *("demo", "dmat", "small"),
    output=OUTPUT,
    data={"source": str(Path(IMAGES).resolve()), "resolution": 32, "channels": 1, "train_limit": None, "test_limit": None},
    generator={"path": "mnist32"},
    training={"epochs": EPOCHS},
)

# %% Projection: each image, and beside it g(w), the closest that the generator has. What is there is not made again
test = open_set(make_set(config), "test")
print(f"{test.manifest['splits']} images, mean pixel error {test.manifest['means']['l1']:.3f}")

# %% Training: half of the loss in pixel space, half on the manifold
model = train(config)

# %% How robust is it? Rows of a suite on 30 of the test images, in per cent
results = evaluate({"dmat": model}, test, config.generator.path, config.evaluation, limit=30)
print(terminal_table(results, ["dmat"]))

# %% Labels for images that have none
labels = predict(model, NEW).to_pylist()
right = sum(row["class_name"] == row["path"][0] for row in labels)  # here the file's name begins with the digit
for row in labels[:3]:
    print(f"{row['path']}: {row['class_name']} ({row['probability']:.0%})")
print(f"{right} of {len(labels)} new images are labelled as they should be")
