# tetdist with CUDA 13. Build: docker build -t tetdist .
# Run: docker run --gpus all --shm-size 8g -v /data:/data -v $PWD/runs:/opt/tetdist/runs tetdist \
#        deepspeed tetdist/train.py --config sew34_t4.yaml data.root=/data/imagenet
# For CUDA 12 drivers add --build-arg CUDA=12.8.1 --build-arg DALI=cuda120 --build-arg TORCH_INDEX=URL,
#   where URL is the index that pytorch.org names for torch with that CUDA.
# Versions are those that last passed the tests. If the index lacks that version of torch, add
#   --build-arg CONSTRAINTS=/dev/null for the newest versions that pyproject.toml allows.
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04
ARG CUDA
ARG DALI=cuda130
ARG TORCH_INDEX=
ARG CONSTRAINTS=constraints.txt

# The fused kernels are built at run time; that needs g++ and the Python headers.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      g++ git make python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/tetdist
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/venv

# torch's wheels include CUDA, and each index has them for one version of CUDA. It must be the image's.
COPY constraints.txt ./
RUN pip install --no-cache-dir -c "${CONSTRAINTS}" ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} \
      "torch>=2.6" "torchvision>=0.21" \
 && python -c 'import sys, torch; c = str(torch.version.cuda); \
      sys.exit(None if c.split(".")[0] == sys.argv[1].split(".")[0] else \
      f"torch is built for CUDA {c}, the image has {sys.argv[1]}: set TORCH_INDEX")' "${CUDA}"

# The dependencies change less often than the code, so they are installed first. setup.py packages
# configs/, for which empty folders suffice here.
COPY pyproject.toml setup.py tetdist_command.py README.md LICENSE ./
COPY tetdist/__init__.py tetdist/__init__.py
RUN mkdir -p configs/studies \
 && pip install --no-cache-dir -c "${CONSTRAINTS}" ".[train,${DALI},quickstart]"
COPY . .
RUN pip install --no-cache-dir --no-deps -e .

CMD ["python", "tetdist/train.py", "--help"]
