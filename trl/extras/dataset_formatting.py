"""The dataset features by which a format is recognised, under the path users know."""

from datasets import List, Value

FORMAT_MAPPING = {
    "chatml": List({"content": Value("string"), "role": Value("string")}),
    "instruction": {"completion": Value("string"), "prompt": Value("string")},
}
"""Format name -> its features: `chatml` of a column of messages, `instruction` of a whole dataset."""
