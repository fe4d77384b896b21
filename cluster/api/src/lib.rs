//! What users and tools see of a cluster: resources, errors, client.
//!
//! One REST/JSON API over a Unix socket, and over TLS with a token. Paths:
//!
//! | method and path | does |
//! |---|---|
//! | `GET /v1/version` | [`server::Version`] |
//! | `GET /v1/health` | [`server::Health`]: 200 when this node serves, 503 when not |
//! | `POST /v1/projects/{p}/vms` | [`vm::CreateVm`] → 201 [`vm::VmView`]; the same id and spec again: 200; `?dry_run=true` → [`placement::PlacementView`] |
//! | `GET /v1/projects/{p}/vms` | `?limit&cursor&label=k=v` → [`Page`] of [`vm::VmView`] |
//! | `GET /v1/projects/{p}/vms/{name}` | [`vm::VmView`]; `?wait=ready,stopped&timeout_ms=N` (also `healthy`, `unhealthy`) answers at the first such moment, or 408 |
//! | `DELETE /v1/projects/{p}/vms/{name}` | `?force=true` also when it runs → 202 [`vm::VmView`]; gone when a GET answers 404 (`?wait=gone`) |
//! | `POST /v1/projects/{p}/vms/{name}:start` | → [`vm::VmView`] |
//! | `POST /v1/projects/{p}/vms/{name}:stop` | [`vm::StopVm`] → [`vm::VmView`] |
//! | `POST /v1/projects/{p}/vms/{name}:exec` | `Upgrade: blixard-stream` → 101, then exec frames of `blixard_vmm_api::guest::frame` |
//! | `POST /v1/projects/{p}/vms/{name}:console` | `Upgrade: blixard-stream` → 101, then bytes of the serial console |
//! | `GET /v1/projects/{p}/vms/{name}:logs` | `?follow=true&tail=N` → text, chunked |
//! | `POST /v1/images?name=N` | body: a tar (rootfs, docker-archive or OCI layout), at most [`UPLOAD_BYTES_MAX`] → 201 [`image::ImageView`] |
//! | `GET /v1/images`, `GET /v1/images/{name}`, `DELETE /v1/images/{name}` | [`Page`] of [`image::ImageView`] … |
//! | `POST /v1/kernels?name=N` | body: a kernel bundle → 201 [`image::KernelView`] |
//! | `GET /v1/kernels`, `GET /v1/kernels/{name}`, `DELETE /v1/kernels/{name}` | [`Page`] of [`image::KernelView`] … |
//! | `GET /v1/doctor` | [`server::Finding`]s of this node |
//! | `GET /v1/cluster` | [`cluster::ClusterStatus`] |
//! | `POST /v1/cluster:init` | [`cluster::InitCluster`]: lets other nodes join this one (Unix socket only) |
//! | `POST /v1/cluster:join` | [`cluster::Applicant`], with the secret of a join token → [`cluster::Admission`] |
//! | `POST /v1/cluster:transfer-leader` | [`cluster::TransferLeader`] → [`cluster::ClusterStatus`] |
//! | `POST /v1/cluster:rotate-authority` | begins a change of the certificate authority → [`cluster::ClusterStatus`] |
//! | `POST /v1/cluster:raise-level` | [`cluster::RaiseLevel`] → [`cluster::ClusterStatus`] |
//! | `POST /v1/join-tokens`, `GET /v1/join-tokens`, `DELETE /v1/join-tokens/{name}` | [`cluster::TokenView`] |
//! | `POST /v1/tokens`, `GET /v1/tokens`, `DELETE /v1/tokens/{name}` | [`cluster::TokenView`]: tokens for this API |
//! | `POST /v1/node:join` | [`cluster::JoinCluster`]: this node leaves its own empty cluster for another one (Unix socket only) |
//! | `GET /v1/nodes`, `GET /v1/nodes/{name}`, `DELETE /v1/nodes/{name}` | [`cluster::NodeView`] |
//! | `POST /v1/nodes/{name}:cordon`, `:uncordon` | [`cluster::NodeView`]; `:uncordon` also ends a drain |
//! | `POST /v1/nodes/{name}:drain` | [`placement::DrainNode`] → [`cluster::NodeView`]: its VMs are moved away |
//! | `POST /v1/nodes/{name}:down` | [`cluster::NodeView`]: an operator says that nothing runs there any more |
//! | `GET /v1/nodes/{name}/policy`, `PUT …` | [`placement::NodePolicy`]; PUT → [`cluster::NodeView`] |
//! | `GET /v1/watch?after=R` | NDJSON of [`watch::Event`], 410 when R is no longer known |
//!
//! `{name}` is a name, an id, or an unambiguous prefix of an id of at least 4 characters. Every answer has a
//! [`REVISION_HEADER`]; a read with `?min_revision=R` waits until this node knows that much, one with `?linearizable=true`
//! until it knows all that was acknowledged anywhere before. Any node takes any request. A mutation may carry
//! [`IDEMPOTENCY_HEADER`] (the answer of its first execution is repeated for a day) and `If-Match: GENERATION`.
#![forbid(unsafe_code)]

pub mod client;
pub mod cluster;
pub mod error;
pub mod health;
pub mod image;
pub mod placement;
pub mod server;
pub mod token;
pub mod vm;
pub mod watch;

pub use blixard_vmm_api::VmId;
pub use client::{Client, ClientError};
pub use error::{ApiError, Detail};

use serde::{Deserialize, Serialize};

/// Header of each answer: the revision of the state that it was read from, a decimal number.
pub const REVISION_HEADER: &str = "blixard-revision";
/// Header of a mutation: at most 128 printable ASCII characters, chosen by the client.
pub const IDEMPOTENCY_HEADER: &str = "idempotency-key";
/// Value of `Upgrade` for exec and console streams.
pub const UPGRADE: &str = "blixard-stream";
/// Largest JSON request body in bytes.
pub const BODY_BYTES_MAX: usize = 1 << 20;
/// Largest uploaded image or kernel in bytes (64 GiB).
pub const UPLOAD_BYTES_MAX: u64 = 64 << 30;
/// Most items of one page, and the default.
pub const PAGE_ITEMS_MAX: usize = 500;
/// Longest time that a `wait` takes, in milliseconds.
pub const WAIT_MS_MAX: u64 = 600_000;
/// The project of users who name none.
pub const DEFAULT_PROJECT: &str = "default";

/// Some items of a list, in order of name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page<T> {
    /// The items.
    pub items: Vec<T>,
    /// Where the next page begins; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    /// Revision of the state they were read from.
    pub revision: u64,
}

/// Checks the name of a VM, image or kernel: 1 to 63 lower-case letters, digits and hyphens, beginning and ending with a
/// letter or digit (RFC 1123 section 2.1); names of images may also contain `.`, `_`, `/` and `:` inside.
///
/// # Errors
/// What is wrong and what is possible.
pub fn check_name(name: &str, image: bool) -> Result<(), String> {
    let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let inner =
        |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || (image && b"._/:".contains(&b));
    let bytes = name.as_bytes();
    let longest = if image { 255 } else { 63 };
    if bytes.len() <= longest && edge(bytes.first()) && edge(bytes.last()) && bytes.iter().all(|b| inner(*b))
    {
        return Ok(());
    }
    let more = if image { " (also . _ / : inside)" } else { "" };
    Err(format!(
        "1 to {longest} lower-case letters, digits and hyphens{more}, first and last a letter or digit"
    ))
}

#[cfg(test)]
mod tests {
    use super::check_name;

    #[test]
    fn names_are_host_names_and_image_names_may_have_paths_and_tags() {
        for good in ["a", "web-1", "0x"] {
            assert_eq!(check_name(good, false), Ok(()), "{good}");
        }
        assert_eq!(check_name("docker.io/library/alpine:3.20", true), Ok(()));
        for bad in ["", "-a", "a-", "A", "a b", "ä", "a/b", &"a".repeat(64)] {
            assert!(check_name(bad, false).is_err(), "{bad}");
        }
    }
}
