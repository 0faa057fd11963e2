"""Records how PyTorch resizes a table of positions: positions.npz.

    python tests/golden/record_positions.py

needs torch and numpy. As BEiT-3's code loads a checkpoint at another image size (its
`load_model_and_may_interpolate`): the first three rows stay, the grid goes through `interpolate`,
bicubic, without align_corners.

| array | shape | meaning |
|---|---|---|
| `table` | [3 + 9, 5] | rows: two that nothing reads, CLS, 3 x 3 patches |
| `<n>` | [3 + n n, 5] | the table for n x n patches, n = 1, 2, 5, 7 |
"""

from pathlib import Path

import numpy as np
import torch
from record_data2vec_vision import save
from torch.nn import functional as F

FILE = Path(__file__).with_name("positions.npz")


def main():
    """Writes the file."""
    table = torch.as_tensor(np.random.default_rng(3).standard_normal((12, 5)).astype(np.float32))
    grid = table[3:].double().T.reshape(1, 5, 3, 3)
    arrays = {"table": table.numpy()}
    for n in (1, 2, 5, 7):
        new = F.interpolate(grid, size=(n, n), mode="bicubic", align_corners=False)
        rows = torch.cat([table[:3].double(), new[0].flatten(1).T])
        arrays[str(n)] = rows.numpy().astype(np.float32)
    save(FILE, arrays)
    print(f"{FILE.name}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
