"""
# Hyperparameters by implicit differentiation

Tune the regularization of ridge and of logistic regression by gradient descent on a validation
loss. The gradient passes *through* the fitted weights, and is checked against closed forms.

A fit is an inner problem, and the validation loss an outer one:

```text
minimize over λ   validation(w*(λ))     where   w*(λ) = argmin over w  training(w) + ½ Σⱼ λⱼ wⱼ²
```

The usual way is a grid over one λ. A gradient allows one λ for each feature: ten of them, or a
thousand, for one more linear system, whatever their number.
"""

# %%
# ## Ridge regression: five folds, five problems
#
# The data are scikit-learn's: how a diabetes advanced within a year, from 10 measurements of 442
# people. The five folds of a cross-validation differ in the rows they train on, and are otherwise
# alike. So they are a batch of five problems, and one call fits all five.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import softplus

import implicitopt

torch.manual_seed(0)


def standardized(a):
    """Columns of mean 0 and deviation 1, in float64."""
    a = torch.tensor(a, dtype=torch.float64)
    return (a - a.mean(dim=0)) / a.std(dim=0)


table = load_diabetes()
A, y = standardized(table.data), standardized(table.target)
folds, rows, features = 5, *A.shape
fold_of = torch.randperm(rows) % folds
validated = torch.stack([fold_of == k for k in range(folds)]).double()  # (5, 442): 1 if held out
trained = 1 - validated
print(f"{rows} people, {features} features, {folds} folds")

# %%
# What implicitopt optimizes is called `x`; here it is the weights, `(5, 10)`. It asks for a map
# `f(z, x)` whose fixed point the loss is read from. Here `z` is what the weights predict, `Aw`.
# That does not depend on `z`, so the fixed point is reached at once. The method is made for maps
# that do depend on `z`, but nothing stands in the way of this simplest one.
#
# `adjoint=Implicit()` makes `sol.x` differentiable in all that `f` and the loss read. Here that is
# `log_decay`.


def predict(z, w):
    """(5, features) -> (5, people)."""
    return w @ A.T


def fit(log_decay):
    """The weights of all folds, for one λ or one a feature."""

    def loss(z, w):
        error = (trained * (z - y) ** 2).sum(dim=1) / trained.sum(dim=1)
        return error / 2 + (log_decay.exp() * w**2).sum(dim=1) / 2

    return implicitopt.solve(
        predict,
        loss,
        torch.zeros(folds, features, dtype=torch.float64),
        torch.zeros(folds, rows, dtype=torch.float64),
        adjoint=implicitopt.Implicit(),
        tol=1e-10,
        max_steps=1000,
        throw=True,
    )


def validation(w):
    """The mean squared error on held-out people, over all folds."""
    return (validated * (predict(None, w) - y) ** 2).sum() / rows


log_decay = torch.full((features,), -3.0, dtype=torch.float64, requires_grad=True)
sol = fit(log_decay)
print(sol)

# %%
# ## Is it right?
#
# Ridge regression has a closed form, `w = (AᵀA/n + diag λ)⁻¹ Aᵀy/n`, which torch can differentiate
# by itself. Both the weights and the gradient must agree with it.


def closed_form(log_decay):
    """The same weights by dense linear algebra."""
    weight = trained / trained.sum(dim=1, keepdim=True)
    gram = torch.einsum("kn,ni,nj->kij", weight, A, A) + torch.diag(log_decay.exp())
    return torch.linalg.solve(gram, torch.einsum("kn,ni,n->ki", weight, A, y))


(found,) = torch.autograd.grad(validation(sol.x), log_decay)
(exact,) = torch.autograd.grad(validation(closed_form(log_decay)), log_decay)
weights_apart = (sol.x - closed_form(log_decay)).abs().max().item()
gradients_apart = (found - exact).abs().max().item()
print(f"weights apart by {weights_apart:.0e}, gradients by {gradients_apart:.0e}")
print("gradient:", [f"{value:+.4f}" for value in found.tolist()])
assert weights_apart < 1e-6
assert gradients_apart < 1e-6

# %%
# The backward pass solved one linear system a fold, with the Hessian of the Lagrangian, by GMRES.
# The matrix is never formed. What became of it is in `sol.adjoint`.

print("statuses", sol.adjoint.status.tolist(), "residual", f"{sol.adjoint.residual.max():.0e}")

# %%
# ## One λ on a grid, or ten by gradient descent
#
# L-BFGS on ten numbers needs few steps. Each is a fit of all folds and one backward pass.

grid = torch.linspace(-7, 1, 17, dtype=torch.float64)
with torch.no_grad():
    on_grid = torch.stack([validation(closed_form(value.expand(features))) for value in grid])

optimizer = torch.optim.LBFGS([log_decay], lr=0.5, max_iter=8, line_search_fn="strong_wolfe")
tuned = []


def step():
    """What L-BFGS calls: the outer loss, and its gradient."""
    optimizer.zero_grad()
    outer = validation(fit(log_decay).x)
    outer.backward()
    tuned.append(outer.item())
    return outer


optimizer.step(step)
print(f"best single λ: {on_grid.min():.5f}; a λ for each feature: {min(tuned):.5f}")

_, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.plot(grid, on_grid, label="one λ")
left.axhline(min(tuned), color="C1", ls="--", label="a λ for each feature")
left.set(xlabel="log λ", ylabel="validation error")
left.legend()
right.bar(table.feature_names, log_decay.detach().numpy())
right.set(ylabel="log λ")
plt.show()

# %%
# A large λ holds the weight of its feature down. Ten numbers fitted to the validation folds can
# overfit these in turn: to report the error of the tuned model, keep a test set that neither loop
# sees.

# %%
# ## Logistic regression
#
# There is no closed form for the weights now, so the check is on the gradient alone. scikit-learn
# fits the weights, and the implicit function theorem in dense linear algebra gives their
# derivative, `dw/dλ = −H⁻¹ ∂²training/∂w∂λ`, with the Hessian `H` from `torch.func.hessian`.
#
# The data: 30 measurements of 569 tumours, and whether each was malignant. One split, so the loss
# returns a single number, shape `()`, and there is one problem.

table = load_breast_cancer()
A, sign = standardized(table.data), 2 * torch.tensor(table.target, dtype=torch.float64) - 1
inner, outer = torch.arange(len(A)) % 2 == 0, torch.arange(len(A)) % 2 == 1


def training(w, log_decay):
    """Mean logistic loss, and the decay."""
    margin = sign[inner] * (A[inner] @ w)
    return softplus(-margin).mean() + (log_decay.exp() * w**2).sum() / 2


def held_out(w):
    """Mean logistic loss of the other half."""
    return softplus(-sign[outer] * (A[outer] @ w)).mean()


def fit_logistic(log_decay):
    """The weights of one logistic regression, `(30,)`."""

    def loss(margin, w):
        return softplus(-margin).mean() + (log_decay.exp() * w**2).sum() / 2

    return implicitopt.solve(
        lambda z, w: sign[inner] * (A[inner] @ w),
        loss,
        torch.zeros(30, dtype=torch.float64),
        torch.zeros(int(inner.sum()), dtype=torch.float64),
        adjoint=implicitopt.Implicit(),
        tol=1e-9,
        max_steps=2000,
        throw=True,
    )


log_decay = torch.full((30,), -3.0, dtype=torch.float64, requires_grad=True)
sol = fit_logistic(log_decay)
(found,) = torch.autograd.grad(held_out(sol.x), log_decay)

reference = LogisticRegression(
    C=1 / (inner.sum().item() * log_decay.exp()[0].item()),
    fit_intercept=False,
    tol=1e-12,
    max_iter=10_000,
).fit(A[inner].numpy(), sign[inner].numpy())
w = torch.tensor(reference.coef_[0])
hessian = torch.func.hessian(training)(w, log_decay.detach())
mixed = torch.diag(log_decay.detach().exp() * w)  # ∂²training/∂w∂log λ
slope = torch.func.grad(held_out)(w)
exact = -mixed @ torch.linalg.solve(hessian, slope)

weights_apart_logistic = (sol.x - w).abs().max().item()
gradients_apart_logistic = (found - exact).abs().max().item()
print(sol)
print(f"weights apart by {weights_apart_logistic:.0e}, gradients by {gradients_apart_logistic:.0e}")
assert weights_apart_logistic < 1e-6
assert gradients_apart_logistic < 1e-6

# %%
# Thirty hyperparameters, then, by a few steps of gradient descent:

optimizer = torch.optim.Adam([log_decay], lr=0.3)
errors = []
for _ in range(15):
    optimizer.zero_grad()
    error = held_out(fit_logistic(log_decay).x)
    error.backward()
    optimizer.step()
    errors.append(error.item())
print(f"held-out loss: {errors[0]:.4f} with λ = e⁻³ for all, {min(errors):.4f} after 15 steps")

# %%
# ## What to try next
#
# - `tol` sets how exact the gradient is: its error is in proportion to the inner residual. Loosen
#   it to 1e-3 and watch `gradients_apart` grow.
# - Second derivatives are right too: `torch.autograd.grad(..., create_graph=True)`, for Newton's
#   method on λ. See [gradients](../gradients.md).
# - Other hyperparameters work alike: a weight for each *sample*, a scale for each feature.
# - Put a neural network between the features and the weights, and learn its parameters in the outer
#   problem: that is meta-learning, the subject of [another tutorial](3_meta_learning.md).
