# tetdist with CUDA 13. Build: docker build -t tetdist .
# Run: docker run --gpus all --shm-size 8g -v /data:/data -v $PWD/runs:/opt/tetdist/runs tetdist \
#        deepspeed tetdist/train.py --config sew34_t4.yaml data.root=/data/imagenet
# For CUDA 12 drivers: --build-arg CUDA=12.8.1 --build-arg DALI=cuda120, and with
#   --build-arg TORCH_INDEX=URL the index that pytorch.org names for torch with that CUDA
# The versions are those that passed the tests last; --build-arg CONSTRAINTS=/dev/null: the newest
#   that pyproject.toml allows, for an index that lacks that version of torch.
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04
ARG CUDA
ARG DALI=cuda130
ARG TORCH_INDEX=
ARG CONSTRAINTS=constraints.txt

# g++ and the Python headers are for the fused kernels, which are built at run time.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      g++ git make python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/tetdist
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/venv

# torch brings CUDA with it, and an index has it for one version of CUDA: the image's, or none.
COPY constraints.txt ./
RUN pip install --no-cache-dir -c "${CONSTRAINTS}" ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} \
      "torch>=2.6" "torchvision>=0.21" \
 && python -c 'import sys, torch; c = str(torch.version.cuda); \
      sys.exit(None if c.split(".")[0] == sys.argv[1].split(".")[0] else \
      f"torch is built for CUDA {c}, the image has {sys.argv[1]}: set TORCH_INDEX")' "${CUDA}"

# The dependencies change less often than the code. setup.py takes configs/ into the package: empty
# folders will do for now.
COPY pyproject.toml setup.py tetdist_command.py README.md LICENSE ./
COPY tetdist/__init__.py tetdist/__init__.py
RUN mkdir -p configs/studies \
 && pip install --no-cache-dir -c "${CONSTRAINTS}" ".[train,${DALI},quickstart]"
COPY . .
RUN pip install --no-cache-dir --no-deps -e .

CMD ["python", "tetdist/train.py", "--help"]
