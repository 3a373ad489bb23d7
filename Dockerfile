# The quickstart on a CPU:
#   docker build -t sasa_det . && docker run --rm -v "$PWD/work_dirs:/opt/sasa_det/work_dirs" sasa_det
# The image of Python has its headers. The build of mmcv needs 2.2 GB of memory.
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/sasa_det
COPY . .
# Without CUDA, which torch's default build brings: several GB.
ENV SASA_TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" PIP_NO_CACHE_DIR=1
RUN bash -c "set -euo pipefail; source tools/setup_env.sh sklearn"
ENV PATH="/opt/sasa_det/.venv/bin:$PATH"
CMD ["bash", "tools/quickstart.sh"]
