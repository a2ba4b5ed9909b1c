# distcomp on CPUs: docker build -f docker/cpu.Dockerfile -t distcomp:cpu .
FROM python:3.12.11-bookworm AS build
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12.11-slim-bookworm
# PyPI's PyTorch brings CUDA; this index has the build without.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY docker/requirements.txt /tmp/requirements.txt
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" torch==2.13.0 \
    && pip install --no-cache-dir --requirement /tmp/requirements.txt
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl \
    && useradd --create-home --home-dir /work --uid 1000 distcomp
COPY examples /examples
USER 1000
WORKDIR /work
CMD ["distcomp", "doctor"]
