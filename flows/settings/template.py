"""The configuration that `graceful init` writes: every table that a team has to think about."""

DEFAULTS = """\
[policy]
alpha = 0.05
k = 1
quality_margin_points = 0.5
max_nfr = 0.02
max_dip_points = 1.0
max_wave_zero_share = 0.10
required_slices = []

[gallery]
order = "random"
probation_hours = 168

# local: a Ray cluster for each update alone; auto: the cluster this machine belongs to; http://head:8265: Ray jobs.
[cluster]
address = "local"
num_workers = 1
embed_workers = 2

# When 'graceful serve' runs an update: Monday at three.
[schedule]
cron = "0 3 * * 1"
timezone = "UTC"
"""
"""The tables that are the same for all pictures, with the values that they have anyway."""

TEMPLATE = f"""\
# Configuration of this workspace. Relative paths count from this file; $NAME is taken from the environment.
# Every key and its meaning: docs/configuration.md. A key that does not exist is an error.
name = "image-search"

# Images to train on: a Parquet file with an image column, or a folder with one sub-folder per label.
[training_data]
source = "parquet"
path = "data/train.parquet"
label_columns = ["label"]

# Images to decide by. open_set: none of their identities may be trained on; closed_set: none of the images.
[evaluation]
protocol = "open_set"
slices = []

[evaluation.queries]
source = "parquet"
path = "data/queries.parquet"
label_columns = ["label"]

[evaluation.gallery]
source = "parquet"
path = "data/gallery.parquet"
label_columns = ["label"]

[training]
width = 128
epochs = 6
backbone = {{ name = "small_cnn" }}
preprocessing = {{ image_size = 32, channels = 3, mean = [0.5, 0.5, 0.5], std = [0.25, 0.25, 0.25] }}
augmentation = {{ kind = "crop_flip" }}

# The limits of a decision, written down before the first update. These are the defaults.
{DEFAULTS}"""
