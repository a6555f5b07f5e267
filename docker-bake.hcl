# docker buildx bake            the musl image for this machine
# docker buildx bake all        all variants for both architectures
# docker buildx bake release    both architectures, attested and reproducible, pushed to REGISTRY
# docker buildx bake check      the Dockerfiles' rules
#
# Each variable can be set in the environment, for a release:
#
#   TAG=1.2.3 REGISTRY=registry.example/team SOURCE=https://git.example/team/warmdock REVISION=$(git rev-parse HEAD) \
#       SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) docker buildx bake release

variable "PACKAGE" {
  description = "The package in the workspace that is built"
  default     = "warmdock"
  validation {
    condition     = can(regex("^[A-Za-z0-9_][A-Za-z0-9_-]*$", PACKAGE))
    error_message = "PACKAGE is the name of a package in Cargo.toml: letters, digits, - and _."
  }
}

variable "BINARY" {
  description = "The package's binary; its name is the package's if this is empty"
  default     = ""
  validation {
    condition     = can(regex("^([A-Za-z0-9_][A-Za-z0-9_-]*)?$", BINARY))
    error_message = "BINARY is the name of a binary of PACKAGE: letters, digits, - and _."
  }
}

variable "FEATURES" {
  description = "cargo features, separated by commas; empty for none"
  default     = "default"
  validation {
    condition     = can(regex("^([A-Za-z0-9_][A-Za-z0-9_+./,-]*)?$", FEATURES))
    error_message = "FEATURES are names of cargo features, separated by commas: default,s3."
  }
}

variable "PROFILE" {
  description = "cargo's profile"
  default     = "release"
  validation {
    condition     = can(regex("^[A-Za-z0-9_][A-Za-z0-9_-]*$", PROFILE))
    error_message = "PROFILE is the name of a cargo profile: letters, digits, - and _."
  }
}

variable "RUST_VERSION" {
  description = "The version of the builder's image rust:<version>-trixie; that of rust-toolchain.toml"
  default     = "1.95.0"
  validation {
    condition     = can(regex("^1\\.[0-9]+(\\.[0-9]+)?$", RUST_VERSION))
    error_message = "RUST_VERSION is a version of Rust, such as 1.95.0."
  }
}

variable "BUILD_PACKAGES" {
  description = "Debian packages that the build needs, separated by spaces: protobuf-compiler cmake"
  default     = ""
  validation {
    condition     = can(regex("^\\s*([A-Za-z0-9][A-Za-z0-9+.:~=/-]*\\s*)*$", BUILD_PACKAGES))
    error_message = "BUILD_PACKAGES are names of Debian packages, separated by spaces: protobuf-compiler cmake."
  }
}

variable "HEALTHCHECK" {
  description = "self: Docker runs the binary's subcommand healthcheck; none: the image has no HEALTHCHECK"
  default     = "self"
  validation {
    condition     = can(regex("^(self|none)$", HEALTHCHECK))
    error_message = "HEALTHCHECK is self or none."
  }
}

# SECURITY: whoever can write a cache mount can change what the next build from it links.
variable "CACHE_SCOPE" {
  description = "Builds with another name here share no cache mounts: for sources that are not trusted"
  default     = ""
  validation {
    condition     = can(regex("^[A-Za-z0-9_-]*$", CACHE_SCOPE))
    error_message = "CACHE_SCOPE is a name: letters, digits, - and _."
  }
}

variable "DEPENDENCIES" {
  description = "mount: the builder keeps compiled crates; layer: the build cache has them as well, for builders that begin empty"
  default     = "mount"
  validation {
    condition     = can(regex("^(mount|layer)$", DEPENDENCIES))
    error_message = "DEPENDENCIES is mount or layer."
  }
}

variable "REGISTRY" {
  description = "Where release pushes to: registry.example/team, without the image's name"
  default     = ""
  validation {
    condition     = can(regex("^([^/, ]+(/[^/:, ]+)*)?$", REGISTRY))
    error_message = "REGISTRY is a host and a path, without https:// before and / behind it: registry.example/team."
  }
}

# SECURITY: the cache has the sources, those of private crates too. Whoever may read this repository may read them.
variable "CACHE" {
  description = "The repository that release keeps its cache in, as private as your sources; empty for no cache"
  default     = notequal(REGISTRY, "") ? "${REGISTRY}/${PACKAGE}-cache" : ""
  validation {
    # A wrong REGISTRY is reported by its own check.
    condition     = notequal(REGISTRY, "") && equal(CACHE, "${REGISTRY}/${PACKAGE}-cache") || can(regex("^([^/, ]+(/[^/:, ]+)*)?$", CACHE))
    error_message = "CACHE is a host and a path, without https:// before and a tag behind it: registry.example/closed/cache."
  }
}

variable "TAG" {
  description = "The image's tag, and its version label"
  default     = "latest"
  validation {
    condition     = can(regex("^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$", TAG))
    error_message = "TAG is a tag of an image: letters, digits, . _ and -, at most 128."
  }
}

variable "SOURCE" {
  description = "Label: the address of the repository"
  default     = ""
  validation {
    condition     = can(regex("^[^ ]*$", SOURCE))
    error_message = "SOURCE is the address of the repository: https://git.example/team/warmdock."
  }
}

variable "REVISION" {
  description = "Label: the commit that is built"
  default     = ""
  validation {
    condition     = can(regex("^[^ ]*$", REVISION))
    error_message = "REVISION is a commit: git rev-parse HEAD."
  }
}

variable "LICENSES" {
  description = "Label: SPDX expression"
  default     = equal(PACKAGE, "warmdock") ? "Apache-2.0" : ""
  validation {
    condition     = can(regex("^[A-Za-z0-9.+:() -]*$", LICENSES))
    error_message = "LICENSES is an SPDX expression: Apache-2.0 OR MIT."
  }
}

variable "SOURCE_DATE_EPOCH" {
  description = "Seconds since 1970, which the image claims to be from: git log -1 --format=%ct; empty for when it is made"
  default     = ""
  validation {
    condition     = can(regex("^[0-9]*$", SOURCE_DATE_EPOCH))
    error_message = "SOURCE_DATE_EPOCH is a number of seconds: git log -1 --format=%ct."
  }
}

# Files with these ids are handed to the build where the variables name them.
variable "KNOWN_HOSTS" {
  description = "File with the host keys of SSH servers that crates come from"
  default     = ""
  validation {
    condition     = can(regex("^[^,]*$", KNOWN_HOSTS))
    error_message = "KNOWN_HOSTS is the path of a file, which has no comma."
  }
}

variable "GITCONFIG" {
  description = "File that sends git elsewhere, such as through a warmdock"
  default     = ""
  validation {
    condition     = can(regex("^[^,]*$", GITCONFIG))
    error_message = "GITCONFIG is the path of a file, which has no comma."
  }
}

variable "CARGO_CONFIG" {
  description = "File that sends cargo elsewhere, such as through a warmdock"
  default     = ""
  validation {
    condition     = can(regex("^[^,]*$", CARGO_CONFIG))
    error_message = "CARGO_CONFIG is the path of a file, which has no comma."
  }
}

variable "CA" {
  description = "File with certificates of your own authorities, trusted besides the public ones where crates come from"
  default     = ""
  validation {
    condition     = can(regex("^[^,]*$", CA))
    error_message = "CA is the path of a file, which has no comma."
  }
}

variable "SSH" {
  description = "Whether private crates come over SSH: hands the agent of SSH_AUTH_SOCK to the build"
  default     = false
}

# What a CI's metadata action says (labels, annotations, tags) replaces what stands here: its bake file, given after this
# one, defines the same target. Each variant has tags of its own: the action's `bake-target` names whose they are.
target "docker-metadata-action" {
  tags = [tag("musl")]
}

target "docker-metadata-action-musl-distroless" {
  tags = [tag("musl-distroless")]
}

target "docker-metadata-action-debian" {
  tags = [tag("debian")]
}

target "_common" {
  context = "."
  args = {
    PACKAGE           = PACKAGE
    BINARY            = notequal(BINARY, "") ? BINARY : PACKAGE
    FEATURES          = FEATURES
    PROFILE           = PROFILE
    RUST_VERSION      = RUST_VERSION
    BUILD_PACKAGES    = BUILD_PACKAGES
    HEALTHCHECK       = HEALTHCHECK
    CACHE_SCOPE       = CACHE_SCOPE
    DEPENDENCIES      = DEPENDENCIES
    SOURCE            = SOURCE
    REVISION          = REVISION
    VERSION           = TAG
    LICENSES          = LICENSES
    # Empty without it: a label with the time of each build would make each another image.
    CREATED           = try(timeadd("1970-01-01T00:00:00Z", "${SOURCE_DATE_EPOCH}s"), "")
    SOURCE_DATE_EPOCH = SOURCE_DATE_EPOCH
  }
  # For WORKSPACE there is no variable, as Jenkins gives each job one of that name: --set '*.args.WORKSPACE=services'
  # Base images are replaced by name: --set '*.contexts.rust:1.95.0-trixie=docker-image://mirror.example/rust'
  contexts = {}
  ssh      = SSH ? ["default"] : []
  secret = concat(
    notequal(KNOWN_HOSTS, "") ? ["id=known_hosts,src=${KNOWN_HOSTS}"] : [],
    notequal(GITCONFIG, "") ? ["id=gitconfig,src=${GITCONFIG}"] : [],
    notequal(CARGO_CONFIG, "") ? ["id=cargo_config,src=${CARGO_CONFIG}"] : [],
    notequal(CA, "") ? ["id=ca,src=${CA}"] : [],
  )
  # Builders of buildx's own would keep what they made to themselves.
  output = ["type=docker"]
  # An attestation would turn the image into an index, which not every tool takes; release has them.
  attest = ["type=provenance,disabled=true", "type=sbom,disabled=true"]
}

target "_both" {
  platforms = ["linux/amd64", "linux/arm64"]
  # Whatever the builder does by itself: an archive of two architectures is not for every Docker.
  output = []
}

target "musl" {
  inherits    = ["_common", "docker-metadata-action"]
  dockerfile  = "Dockerfile.musl"
  description = "Static binary in scratch"
}

target "musl-distroless" {
  inherits    = ["_common", "docker-metadata-action", "docker-metadata-action-musl-distroless"]
  dockerfile  = "Dockerfile.musl"
  description = "Static binary in distroless static, with time zones and /etc/passwd"
  args        = { BASE = "gcr.io/distroless/static-debian13" }
}

target "debian" {
  inherits    = ["_common", "docker-metadata-action", "docker-metadata-action-debian"]
  dockerfile  = "Dockerfile.debian"
  description = "glibc, in Debian slim"
}

group "default" {
  targets = ["musl"]
}

# A matrix is a group of its name as well.
target "all" {
  name     = "all-${variant}"
  matrix   = { variant = ["musl", "musl-distroless", "debian"] }
  inherits = [variant, "_both"]
}

target "release" {
  name     = "release-${variant}"
  matrix   = { variant = ["musl", "musl-distroless", "debian"] }
  inherits = [variant, "_both"]
  attest   = ["type=provenance,mode=max", "type=sbom"]
  # Times are those of the commit: the same sources give the same digest. Docker's own builder can do that only where it
  # stores nothing of what it pushes, for it would unpack it. Without REGISTRY, images would go to Docker's; without
  # SOURCE_DATE_EPOCH, they would have no time of their own; and `latest` is no version. The type or the stage is then the
  # message of the error that there is none such.
  output = [notequal(REGISTRY, "") ? "type=image,push=true,store=false,rewrite-timestamp=true" : "type=REGISTRY is empty: REGISTRY=registry.example/team docker buildx bake release"]
  target = notequal(TAG, "latest") ? can(regex("[1-9]", SOURCE_DATE_EPOCH)) ? "image" : "SOURCE_DATE_EPOCH is empty or 0: SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) docker buildx bake release" : "TAG is latest: TAG=1.2.3 docker buildx bake release"
  # mode=min beside the image would be no safer: it takes along the layers that an earlier export has made.
  cache-from = notequal(CACHE, "") ? ["type=registry,ref=${CACHE}:${PACKAGE}-${variant}"] : []
  cache-to   = notequal(CACHE, "") ? ["type=registry,ref=${CACHE}:${PACKAGE}-${variant},mode=max,compression=zstd,ignore-error=true"] : []
}

target "check" {
  name     = "check-${variant}"
  matrix   = { variant = ["musl", "debian"] }
  inherits = [variant]
  call     = "check"
}

function "image" {
  params = []
  result = notequal(REGISTRY, "") ? "${REGISTRY}/${PACKAGE}" : PACKAGE
}

# The musl image is the one without a suffix.
function "tag" {
  params = [variant]
  result = equal(variant, "musl") ? "${image()}:${TAG}" : "${image()}:${TAG}-${variant}"
}
