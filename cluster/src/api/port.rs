//! The TCP port of a node with an identity: TLS for other nodes and for users, told apart by protocol.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::Shared;
use super::error::Failure;
use super::serve::{Accept, ServeError};
use crate::auth::access;
use crate::auth::tls::{Inbound, PEER, Tls};
use crate::clock;
use crate::raft::peer::server::PeerServer;

/// Longest time for a handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// Most handshakes at once; further connections wait.
const HANDSHAKES_MAX: usize = 256;
/// Most connections of other nodes at once: four of each of many nodes.
const PEERS_MAX: usize = 4096;
/// Pause after the system had no descriptor left for another connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Encrypted connections of users.
pub struct Users(Mutex<mpsc::Receiver<Inbound>>);

impl Accept for Users {
    type Stream = Inbound;

    async fn next(&self) -> io::Result<Inbound> {
        match self.0.lock().await.recv().await {
            Some(stream) => Ok(stream),
            // The port has ended; so does whoever asks, by the same signal.
            None => std::future::pending().await,
        }
    }
}

/// Listens for other nodes and users.
///
/// # Errors
/// [`ServeError::Listen`].
pub async fn listen(address: SocketAddr) -> Result<TcpListener, ServeError> {
    let wrong = |source| ServeError::Listen { address: address.to_string(), source };
    TcpListener::bind(address).await.map_err(wrong)
}

/// Accepts connections until `stop`: those of other nodes go to `peers`, those of users come out of the answer.
pub fn open(listener: TcpListener, tls: Tls, peers: PeerServer, stop: CancellationToken) -> Users {
    let (users, receiver) = mpsc::channel(16);
    tokio::spawn(async move {
        let (handshakes, peer_room) =
            (Arc::new(Semaphore::new(HANDSHAKES_MAX)), Arc::new(Semaphore::new(PEERS_MAX)));
        while let Some(Ok(permit)) = stop.run_until_cancelled(Arc::clone(&handshakes).acquire_owned()).await {
            let (stream, from) = match stop.run_until_cancelled(listener.accept()).await {
                None => break,
                Some(Ok(accepted)) => accepted,
                Some(Err(error)) => {
                    tracing::warn!("cannot accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (tls, users, peers, peer_room) =
                (tls.clone(), users.clone(), peers.clone(), Arc::clone(&peer_room));
            tokio::spawn(async move {
                let stream = handshake(&tls, stream, from).await;
                drop(permit);
                let Some(stream) = stream else { return };
                if stream.get_ref().1.alpn_protocol() != Some(PEER) {
                    // Whoever is asked has ended when this fails.
                    users.send(stream).await.ok();
                    return;
                }
                match peer_room.try_acquire() {
                    Ok(_room) => peers.serve(stream, from).await,
                    Err(_) => {
                        tracing::warn!(%from, "too many connections of other nodes; this one is refused")
                    }
                }
            });
        }
    });
    Users(Mutex::new(receiver))
}

async fn handshake(tls: &Tls, stream: TcpStream, from: SocketAddr) -> Option<Inbound> {
    let handshake = async {
        stream.set_nodelay(true)?;
        tls.accept(stream).await
    };
    match tokio::time::timeout(HANDSHAKE_MAX, handshake).await {
        Ok(Ok(stream)) => Some(stream),
        Ok(Err(error)) => {
            tracing::warn!(%from, "a connection is refused: {error}");
            None
        }
        Err(_) => {
            tracing::warn!(%from, "a connection is refused: no handshake within {} s", HANDSHAKE_MAX.as_secs());
            None
        }
    }
}

/// Lets only those through who say the secret of a token, and nobody to what is for this host's users.
async fn authenticate(State(api): State<Shared>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    // Its own token is checked where it is used up.
    if path == "/v1/cluster:join" {
        return next.run(request).await;
    }
    if matches!(path, "/v1/cluster:init" | "/v1/node:join") {
        let text = "this is possible on the node's own socket only";
        return super::refused(Failure::denied(text).suggest("run the command on the node itself"));
    }
    let said = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let secret = said.and_then(access::bearer);
    let name =
        secret.and_then(|secret| access::token_of(&api.consensus.replica().state(), secret, clock::now_ms()));
    if name.is_none() {
        let text = if secret.is_some() { "this token is not known, or over" } else { "a token is needed" };
        tracing::info!(path, "a request over TLS is refused: {text}");
        let failure = Failure::unauthenticated(text)
            .suggest("`blixard token create NAME` on a node makes one; give it in BLIXARD_TOKEN");
        return super::refused(failure);
    }
    next.run(request).await
}

/// The routes for users over TLS.
pub fn for_users(router: Router, api: Shared) -> Router {
    router.layer(from_fn_with_state(api, authenticate))
}
