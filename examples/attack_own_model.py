"""A model of your own, attacked in pixel space, on the manifold, and by a threat that is defined here.

For researchers of robustness. Run it as a script, or cell by cell in an editor that knows "# %%"; needs no Ray.
"""

# %% Sizes: a minute or less on two cores
TRAIN, TEST, EPOCHS, STEPS = 1000, 50, 10, 10
PIXELS, LATENT = 0.1, 0.06  # budgets: L-infinity in [0, 1] pixel units, and in raw units of w

# %% Any torch module will do: images BCHW in [0, 1] to logits
import torch
import torch.nn.functional as F
from torch import nn

from dmat_ray import attack_images, build_threat, load_generator, load_images, project, settings

torch.manual_seed(0)
train, class_names = load_images("mnist5k", "train", limit=TRAIN)
test, _ = load_images("mnist5k", "test", limit=TEST)
network = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()),
    *(nn.Flatten(), nn.Linear(32 * 49, len(class_names))),
)
optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
for _ in range(EPOCHS):
    for rows in torch.randperm(len(train)).split(50):
        optimiser.zero_grad()
        F.cross_entropy(network(train.x_BCHW[rows]), train.y_B[rows]).backward()
        optimiser.step()

# %% The manifold: for each test digit x the w whose g(w) comes close to it
generator = load_generator("mnist32")
found = project(generator, test.x_BCHW, settings("demo").projection, lpips=0)
print(f"projected {len(test)} digits, mean pixel error {found.l1_B.mean():.3f}")


# %% A threat is a way to render a batch under a theta that may move only so far: here a turn and two shifts
from dmat_ray.threats.balls import Ball


class Moved(Ball):
    """theta (B, 3): an angle in units of a sixth of a turn, and shifts in half image sides."""

    def start(self, batch, draws):
        return self.within(draws, batch.x_BCHW.new_empty(len(batch), 3))

    def render(self, batch, theta):
        angle, right, down = theta.unbind(dim=1)
        cos, sin = (angle * torch.pi / 3).cos(), (angle * torch.pi / 3).sin()
        maps = torch.stack([torch.stack([cos, -sin, right], dim=1), torch.stack([sin, cos, down], dim=1)], dim=1)
        grid = F.affine_grid(maps, list(batch.x_BCHW.shape), align_corners=False)
        return F.grid_sample(batch.x_BCHW, grid, align_corners=False).clamp(0, 1)


# %% One search for every threat. The attack along the manifold begins at g(w), so all of them do here, to be compared
attacks = {
    "pixels": build_threat("image", eps=PIXELS),
    "manifold": build_threat("latent", eps=LATENT, generator=generator),
    "moved": Moved("linf", 0.25),
}
x, y = found.x_BCHW, test.y_B
with torch.no_grad():
    fallen = {"none": int((network(x).argmax(dim=1) != y).sum())}
for name, threat in attacks.items():
    fallen[name] = int(attack_images(network, threat, x, y, found.w_BLD, steps=STEPS).broken_B.sum())
for name, count in fallen.items():
    print(f"{name:>8}: {count} of {len(test)} digits are taken for another")
