"""Types of arrays in signatures."""

import jax
import numpy as np

# An array of JAX, traced or not, or of NumPy. Functions take ids, lengths, positions, masks and weights from the data as either;
# what layers compute is an array of JAX.
AnyArray = jax.Array | np.ndarray
