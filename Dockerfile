# LiteGuard in a container: docs/getting-started.md says how to build and start it.
#
#   SETS         which of requirements-*.txt: "train bundle convert" (all), or "train"
#   TORCH_INDEX  package index of the build of torch to take (CPU, or another CUDA); empty: the
#                index's default, which is a CUDA build and needs an NVIDIA driver on the host only
#   PYTHON       3.11 to 3.13
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

ARG SETS="train bundle convert"
ARG TORCH_INDEX=""

# For `make demo`.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends make \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /liteguard
COPY requirements*.txt constraints.txt ./
# torch first, so that the pins find the wanted build installed. A deleted nightly makes the exact
# constraints unsatisfiable: then the pins alone decide, as in the Makefile.
RUN python -m venv .venv \
 && if [ -n "$TORCH_INDEX" ]; then \
      .venv/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep ^torch== requirements-train.txt)"; \
    fi \
 && for set in $SETS; do files="$files -r requirements-$set.txt"; done \
 && { .venv/bin/pip install --no-cache-dir $files -c constraints.txt \
      || .venv/bin/pip install --no-cache-dir $files; }
ENV PATH=/liteguard/.venv/bin:$PATH

COPY *.py pyproject.toml Makefile README.md LICENSE NOTICE CHANGELOG.md ./
COPY liteguard liteguard
COPY configs configs
COPY benchmarks benchmarks
# `make demo` finds its environment made.
RUN case "$SETS" in *convert*) touch .venv/.installed;; esac

# Results, prepared data and downloads go where a volume is mounted.
VOLUME /results
ENV HF_HOME=/results/.cache/huggingface
ENV SETS=$SETS
CMD ["sh", "-c", "case \"$SETS\" in *convert*) python doctor.py;; *) python doctor.py --only train;; esac"]
