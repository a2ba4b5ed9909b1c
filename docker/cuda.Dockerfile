# distcomp on NVIDIA GPUs: docker build -f docker/cuda.Dockerfile -t distcomp:cuda .
FROM python:3.12.11-bookworm AS build
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
COPY docker/requirements.txt /tmp/requirements.txt
RUN pip install --no-cache-dir --requirement /tmp/requirements.txt
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl \
    && useradd --create-home --home-dir /work --uid 1001 distcomp
COPY examples /examples
USER 1001
WORKDIR /work
CMD ["distcomp", "doctor"]
