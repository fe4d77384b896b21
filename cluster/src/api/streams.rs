//! Exec and console: the connection is taken over (RFC 9110 section 7.8) and its bytes are copied to and from the
//! descriptor that the agent opened, unread. When one side has said all, the other may still answer.

use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;

use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use blixard_agent_api::AgentError;
use blixard_api::{UPGRADE, VmId};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::error::Failure;
use super::query::Parameters;
use super::{Api, Shared};

/// What is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The exec port of the guest.
    Exec,
    /// The serial console.
    Console,
}

/// Bytes that are copied at once, each way.
const COPY_BYTES: usize = 64 << 10;

/// `POST …/{name}:exec` and `…/{name}:console`
///
/// # Errors
/// 400 without the upgrade, 404, 409 when the VM is not there yet, 503 without agent, or when its node cannot be reached.
pub async fn open(
    api: Shared,
    project: &str,
    name: &str,
    request: Request,
    kind: Kind,
) -> Result<Response, Failure> {
    check(&request)?;
    let vm = api.find_newest(project, name).await?;
    match api.elsewhere(&vm) {
        Some(node) => api.pass_on(node, request).await,
        None => here(api, vm.id, request, kind).await,
    }
}

fn check(request: &Request) -> Result<(), Failure> {
    Parameters::of(request.uri(), &[])?;
    let wanted = request.headers().get(header::UPGRADE).and_then(|v| v.to_str().ok());
    if !wanted.is_some_and(|v| v.eq_ignore_ascii_case(UPGRADE)) {
        return Err(Failure::malformed(format!(
            "this request needs Connection: upgrade and Upgrade: {UPGRADE}"
        )));
    }
    if request.extensions().get::<hyper::upgrade::OnUpgrade>().is_none() {
        return Err(Failure::malformed("this connection cannot be upgraded: HTTP/1.1 is needed"));
    }
    Ok(())
}

/// The same for a VM of this node.
pub(super) async fn here(
    api: Shared,
    vm: VmId,
    mut request: Request,
    kind: Kind,
) -> Result<Response, Failure> {
    check(&request)?;
    let stream = api.descriptor(vm, kind).await?;
    Ok(upgraded(&mut request, api.stop.clone(), async { Ok(stream) }))
}

/// Takes the connection of a request over: its bytes go to and come from `other`, until both sides have ended or the node stops.
pub(super) fn upgraded<S: AsyncRead + AsyncWrite + Unpin + Send>(
    request: &mut Request,
    stop: CancellationToken,
    other: impl Future<Output = io::Result<S>> + Send + 'static,
) -> Response {
    let path = request.uri().path().to_owned();
    let upgrade = hyper::upgrade::on(request);
    tokio::spawn(async move {
        let copy = async {
            let (mut client, mut other) =
                (TokioIo::new(upgrade.await.map_err(io::Error::other)?), other.await?);
            tokio::io::copy_bidirectional_with_sizes(&mut client, &mut other, COPY_BYTES, COPY_BYTES).await
        };
        if let Some(Err(error)) = stop.run_until_cancelled(copy).await {
            tracing::debug!(path, "stream ended: {error}");
        }
    });
    let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static(UPGRADE));
    response
}

impl Api {
    async fn descriptor(&self, vm: VmId, kind: Kind) -> Result<UnixStream, Failure> {
        let open = move |agent: &dyn crate::host::Agent| match kind {
            Kind::Exec => agent.open_exec(vm),
            Kind::Console => agent.open_console(vm),
        };
        let fd = self.ask_agent(open).await?;
        let stream = StdUnixStream::from(fd);
        let ready = stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream));
        ready.map_err(|error| Failure::internal(format!("the agent's stream cannot be used: {error}")))
    }

    /// Asks the agent on a thread that may wait.
    ///
    /// # Errors
    /// See [`Failure`]'s conversion from [`AgentError`].
    pub async fn ask_agent<T: Send + 'static>(
        &self,
        question: impl FnOnce(&dyn crate::host::Agent) -> Result<T, AgentError> + Send + 'static,
    ) -> Result<T, Failure> {
        let agent = Arc::clone(&self.agent);
        let asked = tokio::task::spawn_blocking(move || question(agent.as_ref())).await;
        Ok(asked.unwrap_or(Err(AgentError::Confused))?)
    }
}
