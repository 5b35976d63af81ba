# CPU:          docker build -t jaxla .
# NVIDIA GPUs:  docker build --build-arg EXTRA=cuda12 -t jaxla:cuda12 .    (or cuda13; run with --gpus=all)
# Use:          docker run --rm -v "$PWD:/work" -v jaxla-cache:/cache jaxla verify --data.root=/work/SCANS
FROM python:3.12-slim

ARG EXTRA=""

COPY . /src
RUN pip install --no-cache-dir "/src${EXTRA:+[$EXTRA]}" && rm -r /src

# A volume is mounted with the owner of this folder, and its files stay when the container is removed.
RUN useradd --create-home --uid 1000 jaxla && mkdir /cache /work && chown jaxla /cache /work
ENV XDG_CACHE_HOME=/cache
USER 1000
WORKDIR /work

ENTRYPOINT ["jaxla"]
CMD ["--help"]
