//! Sockets and connections: HTTP/1.1 with limits on time, headers and number of connections.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::header;
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::error::Failure;

/// Time in which the head of a request must arrive.
const HEAD_TIME_MAX: Duration = Duration::from_secs(10);
/// Most bytes of the head of a request.
const HEAD_BYTES_MAX: usize = 32 << 10;
/// Most headers of a request.
const HEADERS_MAX: usize = 64;
/// Most connections at once; further ones wait.
const CONNECTIONS_MAX: usize = 1024;
/// Time that requests under way have when the node stops.
const LEAVE_TIME_MAX: Duration = Duration::from_secs(5);
/// Pause after the system had no descriptor left for another connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why nobody can connect.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket cannot be made.
    #[error("cannot listen at {address}")]
    Listen {
        /// Where.
        address: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A living process listens there.
    #[error("another process listens at {0}")]
    Taken(PathBuf),
    /// Not a loopback address.
    #[error(
        "{0} is not a loopback address: the API has no transport security yet, so it is not offered to other hosts"
    )]
    NotLoopback(SocketAddr),
    /// There is no such group.
    #[error("there is no group {0:?}")]
    NoGroup(String),
}

/// Listens at a Unix socket, whose mode and group decide who may connect. A socket that a dead process left is replaced.
///
/// # Errors
/// See [`ServeError`].
pub fn unix(path: &Path, mode: u32, group: Option<&str>) -> Result<UnixListener, ServeError> {
    let wrong = |source| ServeError::Listen { address: path.display().to_string(), source };
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(ServeError::Taken(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(wrong)?;
        }
        Err(_) => {}
    }
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(wrong)?;
    }
    let listener = UnixListener::bind(path).map_err(wrong)?;
    if let Some(name) = group {
        let found = nix::unistd::Group::from_name(name).ok().flatten();
        let gid = found.ok_or_else(|| ServeError::NoGroup(name.to_owned()))?.gid;
        std::os::unix::fs::chown(path, None, Some(gid.as_raw())).map_err(wrong)?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(wrong)?;
    Ok(listener)
}

/// Listens at a TCP address of this host only.
///
/// # Errors
/// See [`ServeError`].
pub async fn tcp(address: SocketAddr) -> Result<TcpListener, ServeError> {
    if !address.ip().is_loopback() {
        return Err(ServeError::NotLoopback(address));
    }
    let wrong = |source| ServeError::Listen { address: address.to_string(), source };
    TcpListener::bind(address).await.map_err(wrong)
}

/// Refuses what a web page may make a browser on this host send: a request to another name than this host's, or from
/// another origin. A Unix socket is out of a browser's reach.
async fn local_only(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|v| v.to_str().ok()).unwrap_or("");
    let name = host
        .rsplit_once(':')
        .map_or(host, |(name, port)| if port.bytes().all(|b| b.is_ascii_digit()) { name } else { host });
    if !["localhost", "127.0.0.1", "[::1]"].contains(&name) || request.headers().contains_key(header::ORIGIN)
    {
        let text = "this address is for programs on this host: the Host header must name it, and no Origin is accepted";
        return super::refused(Failure::denied(text));
    }
    next.run(request).await
}

/// The routes for a TCP socket.
pub fn for_tcp(router: Router) -> Router {
    router.layer(from_fn(local_only))
}

/// Something that connections come from.
pub trait Accept: Send + 'static {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;
    /// The next connection.
    fn next(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Accept for UnixListener {
    type Stream = tokio::net::UnixStream;

    async fn next(&self) -> io::Result<Self::Stream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

impl Accept for TcpListener {
    type Stream = tokio::net::TcpStream;

    async fn next(&self) -> io::Result<Self::Stream> {
        let (stream, _) = self.accept().await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// Answers requests until `stop`, then lets those under way end.
pub async fn serve<L: Accept>(listener: L, router: Router, stop: CancellationToken) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    while let Some(Ok(permit)) = stop.run_until_cancelled(Arc::clone(&room).acquire_owned()).await {
        let stream = match stop.run_until_cancelled(listener.next()).await {
            None => break,
            Some(Ok(stream)) => stream,
            Some(Err(error)) => {
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIME_MAX)
            .max_buf_size(HEAD_BYTES_MAX)
            .max_headers(HEADERS_MAX)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router.clone()))
            .with_upgrades();
        let leave = stop.clone();
        tokio::spawn(async move {
            let mut connection = std::pin::pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = leave.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!("a connection ended: {error}");
            }
            drop(permit);
        });
    }
    drop(listener);
    let all = u32::try_from(CONNECTIONS_MAX).unwrap_or(u32::MAX);
    if tokio::time::timeout(LEAVE_TIME_MAX, room.acquire_many(all)).await.is_err() {
        tracing::warn!("some requests did not end in time");
    }
}
