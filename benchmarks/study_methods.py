"""What a study trains: presets of the package, or entries of studies/methods.yaml or of a study's own such file."""

METHODS = (
    "standard",
    "at",
    "om_at_fgsm",
    "om_at",
    "dmat",
    "trades",
    "dmat_trades",
    "joint",
    "joint_plus",
    "dmat_trades_plus",
    "dmat_trades_wide",
)
"""What every study trains, in the order of the main tables."""

TABLE = (*METHODS, "dmat_recolor")
"""The main tables' rows: those of METHODS, and what a study's own file of methods adds."""

ABLATIONS = {
    "Share of the on-manifold term, from none to all": ("at", "dmat_latent_25", "dmat", "dmat_latent_75", "om_at"),
    "Latent budget η in training (half, as it is, twice)": ("dmat_eta_03", "dmat", "dmat_eta_12"),
    "Budget ε in training (half, as it is, twice)": ("dmat_eps_05", "dmat", "dmat_eps_20", "at", "at_eps_20"),
    "Steps of the attacks in training (1, 3, 10)": ("dmat_steps_1", "dmat", "dmat_steps_10"),
    "The manifold: of a generator stopped early, and as it is": ("dmat_early", "dmat"),
    "Data: projected images, and as many samples of the generator beside them": ("dmat", "dmat_sampled"),
    "An average of weights and adversarial weight perturbation": (
        "dmat",
        "dmat_plus",
        "dmat_trades",
        "dmat_trades_plus",
        "joint",
        "joint_plus",
    ),
}
"""Title -> the methods that a table sets side by side."""
