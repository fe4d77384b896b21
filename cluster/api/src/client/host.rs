//! Where a node listens, and the connection to it.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::str::FromStr;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::client::TlsStream;

use crate::token::Access;

/// The host of users who name none.
pub const DEFAULT_HOST: &str = "unix:///run/blixard/node.sock";
/// Longest time for a connection to come about.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// Where a node listens: `unix:///PATH` (or the bare absolute path), `https://HOST:PORT` with a token, or
/// `http://HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A Unix socket.
    Unix(PathBuf),
    /// Plain HTTP over TCP: `host:port`.
    Http(String),
    /// HTTP over TLS: `host:port`, and the token by which both ends know each other.
    Https(String, Option<Box<Access>>),
}

/// A text that names no host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no address of a node: unix:///PATH, https://HOST:PORT and http://HOST:PORT are possible"
)]
pub struct NotAHost {
    /// The text, cut to 200 characters.
    pub text: String,
}

impl FromStr for Host {
    type Err = NotAHost;

    fn from_str(text: &str) -> Result<Self, NotAHost> {
        let wrong = || NotAHost { text: text.chars().take(200).collect() };
        let path = text.strip_prefix("unix://").unwrap_or(text);
        if path.starts_with('/') {
            return Ok(Self::Unix(path.into()));
        }
        let (encrypted, authority) = match (text.strip_prefix("http://"), text.strip_prefix("https://")) {
            (Some(authority), _) => (false, authority),
            (None, Some(authority)) => (true, authority),
            (None, None) => return Err(wrong()),
        };
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let (name, port) = authority.rsplit_once(':').ok_or_else(wrong)?;
        let name_ok =
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.:[]_".contains(&b));
        if !name_ok || port.parse::<u16>().is_err() {
            return Err(wrong());
        }
        Ok(if encrypted { Self::Https(authority.into(), None) } else { Self::Http(authority.into()) })
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Http(authority) => write!(f, "http://{authority}"),
            Self::Https(authority, _) => write!(f, "https://{authority}"),
        }
    }
}

impl Host {
    /// Value of the `Host` header.
    pub(super) fn authority(&self) -> &str {
        match self {
            Self::Unix(_) => "localhost",
            Self::Http(authority) | Self::Https(authority, _) => authority,
        }
    }

    /// The same place, with a token when it is one that needs it.
    #[must_use]
    pub fn with_access(self, access: Access) -> Self {
        match self {
            Self::Https(authority, _) => Self::Https(authority, Some(Box::new(access))),
            other => other,
        }
    }

    /// The secret to say, over TLS only.
    pub(super) fn bearer(&self) -> Option<&str> {
        match self {
            Self::Https(_, Some(access)) => Some(&access.secret),
            _ => None,
        }
    }

    pub(super) async fn connect(&self) -> io::Result<Connection> {
        let connected = tokio::time::timeout(CONNECT_TIME, async {
            match self {
                Self::Unix(path) => UnixStream::connect(path).await.map(Connection::Unix),
                Self::Http(authority) => {
                    let stream = TcpStream::connect(authority).await?;
                    stream.set_nodelay(true)?;
                    Ok(Connection::Tcp(stream))
                }
                Self::Https(authority, access) => {
                    let missing = || io::Error::new(io::ErrorKind::PermissionDenied, "a token is needed");
                    let access = access.as_ref().ok_or_else(missing)?;
                    let stream = TcpStream::connect(authority).await?;
                    stream.set_nodelay(true)?;
                    Ok(Connection::Tls(Box::new(super::tls::connect(stream, access).await?)))
                }
            }
        });
        connected.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// What to try when connecting failed like this.
    pub(super) fn advice(&self, error: &io::Error) -> String {
        let start = "start one with `sudo blixard dev`, or name another with --host or BLIXARD_HOST";
        match (self, error.kind()) {
            (Self::Unix(_), io::ErrorKind::NotFound) => {
                format!(
                    "there is no such socket: the node is not running here. Is the path right? If so, {start}"
                )
            }
            (Self::Unix(_), io::ErrorKind::ConnectionRefused) => {
                format!("the socket is there but nobody listens: the node has ended. If so, {start}")
            }
            (Self::Unix(path), io::ErrorKind::PermissionDenied) => format!(
                "your user may not use the socket: run with sudo, or join the group that `ls -lL {}` shows",
                path.display()
            ),
            (Self::Https(..), io::ErrorKind::PermissionDenied) => {
                "give a token for the API in BLIXARD_TOKEN: `blixard token create NAME` on a node makes one"
                    .into()
            }
            (Self::Https(..), io::ErrorKind::InvalidData) => {
                "whoever answers is not of the cluster that the token is for: are address and token right?"
                    .into()
            }
            (Self::Http(_) | Self::Https(..), io::ErrorKind::ConnectionRefused) => {
                format!("nobody listens on this port: is the port right? If so, {start}")
            }
            (_, io::ErrorKind::TimedOut) => {
                format!(
                    "no answer within {} s: is the node overloaded or behind a firewall?",
                    CONNECT_TIME.as_secs()
                )
            }
            _ => format!("check the address; {start}"),
        }
    }
}

/// A connected stream of either kind.
pub(super) enum Connection {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_flush(context),
            Self::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Self::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_and_plain_http_are_hosts_and_nothing_else_is() {
        assert_eq!("/run/x.sock".parse(), Ok(Host::Unix("/run/x.sock".into())));
        assert_eq!("unix:///run/x.sock".parse(), Ok(Host::Unix("/run/x.sock".into())));
        assert_eq!("http://[::1]:8080/".parse(), Ok(Host::Http("[::1]:8080".into())));
        assert_eq!("https://192.0.2.1:7440".parse(), Ok(Host::Https("192.0.2.1:7440".into(), None)));
        for wrong in [
            "",
            "x.sock",
            "unix://x",
            "ftp://a:1",
            "https://a",
            "http://a",
            "http://:1",
            "http://a:b",
            "http://a b:1",
        ] {
            assert!(wrong.parse::<Host>().is_err(), "{wrong}");
        }
        assert_eq!(DEFAULT_HOST.parse::<Host>().unwrap().to_string(), DEFAULT_HOST);
    }
}
