//! Typed calls to a node over its Unix socket, TLS with a token, or plain HTTP.
//!
//! Each call has a connection of its own (a local connect is far cheaper than what is asked for). A mutation carries an
//! `Idempotency-Key`, so a call that a busy node refuses as retryable is repeated a few times without doing it twice.

mod cluster;
mod error;
mod host;
mod stream;
mod tls;
mod transport;
mod upload;

use std::io::Read;
use std::time::Duration;

use hyper::Method;
use serde::de::DeserializeOwned;

pub use error::{ClientError, Refusal};
pub use host::{DEFAULT_HOST, Host, NotAHost};
pub use stream::{ByteStream, Watch};
pub use transport::Stream;
pub use upload::Upload;

use crate::image::{ImageView, KernelView};
use crate::placement::PlacementView;
use crate::server::{Finding, Health, Version};
use crate::vm::{CreateVm, StopVm, VmView};
use crate::{Page, UPLOAD_BYTES_MAX, WAIT_MS_MAX};
use transport::Call;

/// Pauses before a retryable refusal is tried again.
const RETRY_MS: [u64; 4] = [100, 250, 500, 1000];
/// Time on top of a wait before the node counts as silent.
const WAIT_SLACK: Duration = Duration::from_secs(15);

/// A client of one node. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    host: Host,
}

/// How long, and for what, a read waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wait {
    /// Names of moments: a phase, `ready`, `gone`; the first one that is there ends the wait.
    pub until: Vec<String>,
    /// Longest time; a longer one than [`WAIT_MS_MAX`] is cut to it.
    pub time: Duration,
}

impl Client {
    /// A client of the node at `host`. Does not connect yet.
    pub fn new(host: Host) -> Self {
        Self { host }
    }

    /// Where the node listens.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// What answers.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn version(&self) -> Result<Version, ClientError> {
        self.get("/v1/version".into()).await
    }

    /// How the node is, also when it does not serve.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn health(&self) -> Result<Health, ClientError> {
        let mut call = Call::new(Method::GET, "/v1/health".into());
        call.or_503 = true;
        let response = self.send(&mut call).await?;
        transport::json(&self.host, response).await
    }

    /// What the node and its agent found on their host.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn doctor(&self) -> Result<Vec<Finding>, ClientError> {
        self.get("/v1/doctor".into()).await
    }

    /// Asks for a VM.
    ///
    /// # Errors
    /// See [`ClientError`]; 409 a name twice, 422 a wrong field, 507 no capacity.
    pub async fn create_vm(&self, project: &str, vm: &CreateVm) -> Result<VmView, ClientError> {
        self.mutate(Call::new(Method::POST, vms(project)).json(vm)?).await
    }

    /// Where a VM would go, and why not elsewhere.
    ///
    /// # Errors
    /// See [`ClientError`]; 422 a wrong field.
    pub async fn explain_vm(&self, project: &str, vm: &CreateVm) -> Result<PlacementView, ClientError> {
        self.mutate(Call::new(Method::POST, format!("{}?dry_run=true", vms(project))).json(vm)?).await
    }

    /// All VMs of a project that have all of `labels` (`key=value`), in order of name, and the revision of the list.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn list_vms(&self, project: &str, labels: &[String]) -> Result<Page<VmView>, ClientError> {
        let query: Vec<String> = labels.iter().map(|l| format!("label={}", escape(l))).collect();
        self.list(vms(project), query).await
    }

    /// One VM.
    ///
    /// # Errors
    /// See [`ClientError`]; 404.
    pub async fn vm(&self, project: &str, name: &str) -> Result<VmView, ClientError> {
        self.get(vm(project, name)).await
    }

    /// One VM, at the first of some moments.
    ///
    /// # Errors
    /// See [`ClientError`]; 404 also when `gone` is waited for and it is gone, 408 when the time is over.
    pub async fn wait_vm(&self, project: &str, name: &str, wait: &Wait) -> Result<VmView, ClientError> {
        let ms = u64::try_from(wait.time.as_millis()).unwrap_or(WAIT_MS_MAX).min(WAIT_MS_MAX);
        let until: Vec<String> = wait.until.iter().map(|u| escape(u)).collect();
        let path = format!("{}?wait={}&timeout_ms={ms}", vm(project, name), until.join(","));
        let mut call = Call::new(Method::GET, path);
        call.time = Some(Duration::from_millis(ms) + WAIT_SLACK);
        let response = self.send(&mut call).await?;
        transport::json(&self.host, response).await
    }

    /// Asks that a VM be gone; one that runs only with `force`.
    ///
    /// # Errors
    /// See [`ClientError`]; 404, 409 when it runs.
    pub async fn delete_vm(&self, project: &str, name: &str, force: bool) -> Result<VmView, ClientError> {
        let force = if force { "?force=true" } else { "" };
        self.mutate(Call::new(Method::DELETE, format!("{}{force}", vm(project, name)))).await
    }

    /// Asks that a VM run.
    ///
    /// # Errors
    /// See [`ClientError`]; 404.
    pub async fn start_vm(&self, project: &str, name: &str) -> Result<VmView, ClientError> {
        self.mutate(Call::new(Method::POST, format!("{}:start", vm(project, name)))).await
    }

    /// Asks that a VM stop.
    ///
    /// # Errors
    /// See [`ClientError`]; 404.
    pub async fn stop_vm(&self, project: &str, name: &str, stop: StopVm) -> Result<VmView, ClientError> {
        self.mutate(Call::new(Method::POST, format!("{}:stop", vm(project, name))).json(&stop)?).await
    }

    /// A stream of exec frames (`blixard_vmm_api::guest::frame`) to the guest's init.
    ///
    /// # Errors
    /// See [`ClientError`]; 404, 409 when it does not run.
    pub async fn exec(&self, project: &str, name: &str) -> Result<Stream, ClientError> {
        self.upgrade(format!("{}:exec", vm(project, name))).await
    }

    /// The bytes of the serial console, both ways.
    ///
    /// # Errors
    /// See [`ClientError`]; 404, 409 when it does not run.
    pub async fn console(&self, project: &str, name: &str) -> Result<Stream, ClientError> {
        self.upgrade(format!("{}:console", vm(project, name))).await
    }

    /// What the VM wrote to its console: the last `tail` lines (all, when absent), and with `follow` what it will write.
    ///
    /// # Errors
    /// See [`ClientError`]; 404.
    pub async fn logs(
        &self,
        project: &str,
        name: &str,
        follow: bool,
        tail: Option<u64>,
    ) -> Result<ByteStream, ClientError> {
        let tail = tail.map(|n| format!("&tail={n}")).unwrap_or_default();
        let path = format!("{}:logs?follow={follow}{tail}", vm(project, name));
        let response = self.send(&mut Call::new(Method::GET, path)).await?;
        Ok(ByteStream::new(self.host.clone(), response.into_body()))
    }

    /// Imports an image: a tar of a root file system, of a docker archive or of an OCI layout.
    ///
    /// # Errors
    /// See [`ClientError`]; 409, 413, 422.
    pub async fn import_image(&self, name: &str, upload: Upload) -> Result<ImageView, ClientError> {
        self.upload(format!("/v1/images?name={}", escape(name)), upload).await
    }

    /// All images in order of name.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn list_images(&self) -> Result<Page<ImageView>, ClientError> {
        self.list("/v1/images".into(), vec![]).await
    }

    /// One image.
    ///
    /// # Errors
    /// See [`ClientError`]; 404.
    pub async fn image(&self, name: &str) -> Result<ImageView, ClientError> {
        self.get(format!("/v1/images/{}", escape(name))).await
    }

    /// Forgets an image.
    ///
    /// # Errors
    /// See [`ClientError`]; 404, 409 when a VM needs it.
    pub async fn delete_image(&self, name: &str) -> Result<(), ClientError> {
        self.delete(format!("/v1/images/{}", escape(name))).await
    }

    /// Imports a kernel bundle.
    ///
    /// # Errors
    /// See [`ClientError`]; 409, 413, 422.
    pub async fn import_kernel(&self, name: &str, upload: Upload) -> Result<KernelView, ClientError> {
        self.upload(format!("/v1/kernels?name={}", escape(name)), upload).await
    }

    /// All kernels in order of name.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn list_kernels(&self) -> Result<Page<KernelView>, ClientError> {
        self.list("/v1/kernels".into(), vec![]).await
    }

    /// One kernel.
    ///
    /// # Errors
    /// See [`ClientError`]; 404.
    pub async fn kernel(&self, name: &str) -> Result<KernelView, ClientError> {
        self.get(format!("/v1/kernels/{}", escape(name))).await
    }

    /// Forgets a kernel.
    ///
    /// # Errors
    /// See [`ClientError`]; 404, 409 when a VM needs it.
    pub async fn delete_kernel(&self, name: &str) -> Result<(), ClientError> {
        self.delete(format!("/v1/kernels/{}", escape(name))).await
    }

    /// Changes after revision `after`. Connects with the first [`Watch::next`].
    pub fn watch(&self, after: u64) -> Watch {
        Watch::new(self.host.clone(), after)
    }

    async fn send(&self, call: &mut Call) -> Result<hyper::Response<hyper::body::Incoming>, ClientError> {
        let mut pauses = RETRY_MS.iter();
        let once = call.upload.is_some();
        loop {
            match transport::send(&self.host, call).await {
                // Not a wait that took its time (408): that is for the caller to decide.
                Err(ClientError::Refused(refusal))
                    if refusal.error.retryable && matches!(refusal.status, 429 | 503) && !once =>
                {
                    let Some(pause) = pauses.next() else { return Err(ClientError::Refused(refusal)) };
                    tokio::time::sleep(Duration::from_millis(*pause)).await;
                }
                other => return other,
            }
        }
    }

    async fn get<T: DeserializeOwned>(&self, path: String) -> Result<T, ClientError> {
        let response = self.send(&mut Call::new(Method::GET, path)).await?;
        transport::json(&self.host, response).await
    }

    async fn mutate<T: DeserializeOwned>(&self, mut call: Call) -> Result<T, ClientError> {
        call.idempotency = Some(format!("{:032x}", random()?));
        let response = self.send(&mut call).await?;
        transport::json(&self.host, response).await
    }

    async fn delete(&self, path: String) -> Result<(), ClientError> {
        let mut call = Call::new(Method::DELETE, path);
        call.idempotency = Some(format!("{:032x}", random()?));
        self.send(&mut call).await.map(drop)
    }

    async fn upgrade(&self, path: String) -> Result<Stream, ClientError> {
        let mut call = Call::new(Method::POST, path);
        call.upgrade = true;
        let response = self.send(&mut call).await?;
        transport::upgraded(&self.host, response).await
    }

    async fn upload<T: DeserializeOwned>(&self, path: String, upload: Upload) -> Result<T, ClientError> {
        if let Some(length) = upload.length().filter(|l| *l > UPLOAD_BYTES_MAX) {
            let why = format!("{length} bytes are more than the {UPLOAD_BYTES_MAX} that are possible");
            return Err(ClientError::BadRequest(why));
        }
        let mut call = Call::new(Method::POST, path);
        call.upload = Some(Box::new(upload));
        call.time = None;
        let response = self.send(&mut call).await?;
        transport::json(&self.host, response).await
    }

    /// All pages of a list as one; its revision is that of the first page, so a watch from it misses nothing.
    async fn list<T: DeserializeOwned>(
        &self,
        path: String,
        mut query: Vec<String>,
    ) -> Result<Page<T>, ClientError> {
        let fixed = query.len();
        let mut all: Option<Page<T>> = None;
        loop {
            let mark = if query.is_empty() { "" } else { "?" };
            let page: Page<T> = self.get(format!("{path}{mark}{}", query.join("&"))).await?;
            query.truncate(fixed);
            query.extend(page.cursor.iter().map(|c| format!("cursor={}", escape(c))));
            let more = page.cursor.is_some() && !page.items.is_empty();
            let list = match all {
                Some(mut list) => {
                    list.items.extend(page.items);
                    list
                }
                None => page,
            };
            if !more {
                return Ok(Page { cursor: None, ..list });
            }
            all = Some(list);
        }
    }
}

/// 128 random bits from the operating system.
///
/// # Errors
/// `/dev/urandom` cannot be read.
pub fn random() -> Result<u128, ClientError> {
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(ClientError::Random)?;
    Ok(u128::from_ne_bytes(bytes))
}

fn vms(project: &str) -> String {
    format!("/v1/projects/{}/vms", escape(project))
}

fn vm(project: &str, name: &str) -> String {
    format!("{}/{}", vms(project), escape(name))
}

/// Percent-encodes everything but unreserved characters (RFC 3986 section 2.3).
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests;
