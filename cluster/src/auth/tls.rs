//! TLS 1.3 between nodes and from users, by the keys that this node has at present.
//!
//! One port serves both. What a connection is for is said by its protocol (ALPN): [`PEER`] needs a certificate of a node,
//! `http/1.1` (or none) is the API. A peer that speaks another version offers another name and is refused in the handshake.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::AuthError;
use super::authority::{node_name, roots};
use super::identity::{Identity, Keys};
use crate::state::NodeId;

/// Protocol between nodes, with its version.
pub const PEER: &[u8] = b"blixard-peer/1";
/// Protocol of the API.
const HTTP: &[u8] = b"http/1.1";
/// Longest time for a connection and its handshake.
pub const CONNECT_MAX: Duration = Duration::from_secs(2);

/// An encrypted connection that another node began.
pub type Inbound = tokio_rustls::server::TlsStream<TcpStream>;
/// An encrypted connection that this node began.
pub type Outbound = tokio_rustls::client::TlsStream<TcpStream>;

/// This node's present keys, ready for use. Clones share them; new keys hold for connections that begin later.
#[derive(Clone)]
pub struct Tls {
    present: Arc<RwLock<Arc<Present>>>,
}

struct Present {
    keys: Keys,
    acceptor: TlsAcceptor,
    connector: TlsConnector,
}

impl Tls {
    /// With these keys.
    ///
    /// # Errors
    /// See [`AuthError`].
    pub fn new(keys: Keys) -> Result<Self, AuthError> {
        Ok(Self { present: Arc::new(RwLock::new(Arc::new(Present::new(keys)?))) })
    }

    /// Uses these keys from now on.
    ///
    /// # Errors
    /// See [`AuthError`].
    pub fn replace(&self, keys: Keys) -> Result<(), AuthError> {
        let next = Arc::new(Present::new(keys)?);
        *self.present.write().unwrap_or_else(PoisonError::into_inner) = next;
        Ok(())
    }

    fn present(&self) -> Arc<Present> {
        Arc::clone(&self.present.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// What both ends of a handshake work with.
    #[cfg(test)]
    pub fn configs(&self) -> (Arc<ClientConfig>, Arc<ServerConfig>) {
        let present = self.present();
        (Arc::clone(present.connector.config()), Arc::clone(present.acceptor.config()))
    }

    /// The present keys.
    pub fn keys(&self) -> Keys {
        self.present().keys.clone()
    }

    /// Which node this is.
    pub fn identity(&self) -> Identity {
        self.present().keys.identity.clone()
    }

    /// The handshake of a connection that somebody began. Takes as long as the other end; bound it.
    ///
    /// # Errors
    /// What is wrong with the other end.
    pub async fn accept(&self, stream: TcpStream) -> std::io::Result<Inbound> {
        let acceptor = self.present().acceptor.clone();
        acceptor.accept(stream).await
    }

    /// A connection to this node at this address.
    ///
    /// # Errors
    /// What is in the way; also when another node answers.
    pub async fn connect(&self, node: NodeId, address: SocketAddr) -> std::io::Result<Outbound> {
        let present = self.present();
        let name = node_name(&present.keys.identity.cluster, node);
        let name = ServerName::try_from(name).map_err(std::io::Error::other)?;
        let connect = async {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            present.connector.connect(name, stream).await
        };
        let timeout = |_| std::io::Error::from(std::io::ErrorKind::TimedOut);
        tokio::time::timeout(CONNECT_MAX, connect).await.map_err(timeout)?
    }
}

impl Present {
    fn new(keys: Keys) -> Result<Self, AuthError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let authorities = roots(&keys.authorities_pem)?;
        let mut store = RootCertStore::empty();
        for authority in &authorities {
            store.add(authority.clone())?;
        }
        let store = Arc::new(store);
        let foreign = |error: rustls::pki_types::pem::Error| AuthError::Foreign(error.to_string());
        let key = || PrivateKeyDer::from_pem_slice(keys.key_pem.as_bytes()).map_err(foreign);
        let mut chain =
            vec![CertificateDer::from_pem_slice(keys.certificate_pem.as_bytes()).map_err(foreign)?];
        let client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(Arc::clone(&store));
        let mut client = client.with_client_auth_cert(chain.clone(), key()?)?;
        client.alpn_protocols = vec![PEER.to_vec()];
        // A user who knows only the fingerprint of the authority finds it in the chain.
        chain.extend(authorities);
        let verifier = WebPkiClientVerifier::builder_with_provider(store, Arc::clone(&provider))
            .allow_unauthenticated()
            .build()?;
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier);
        let mut server = server.with_single_cert(chain, key()?)?;
        server.alpn_protocols = vec![PEER.to_vec(), HTTP.to_vec()];
        Ok(Self {
            keys,
            acceptor: TlsAcceptor::from(Arc::new(server)),
            connector: TlsConnector::from(Arc::new(client)),
        })
    }
}

/// The node that a verified certificate was made for.
///
/// # Errors
/// [`AuthError::Foreign`] when it names no node of this cluster.
pub fn node_of(certificate: &CertificateDer<'_>, cluster: &str) -> Result<NodeId, AuthError> {
    use x509_parser::extensions::GeneralName;
    let foreign = |text: String| AuthError::Foreign(text);
    let (_, parsed) =
        x509_parser::parse_x509_certificate(certificate).map_err(|error| foreign(error.to_string()))?;
    let names = parsed.subject_alternative_name().map_err(|error| foreign(error.to_string()))?;
    let names = names.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
    let node = names.iter().find_map(|name| match name {
        GeneralName::DNSName(name) => {
            let (node, of) = name.strip_prefix("node-")?.split_once('.')?;
            (of == cluster).then(|| node.parse().ok())?
        }
        _ => None,
    });
    node.ok_or_else(|| foreign("it names no node of this cluster".to_owned()))
}

/// When a certificate (PEM) begins and ends to be valid, in seconds of Unix time, and whether this authority (PEM) signed it.
///
/// # Errors
/// [`AuthError::Foreign`].
pub fn validity(certificate_pem: &str, authority_pem: &str) -> Result<(i64, i64, bool), AuthError> {
    let foreign = |text: String| AuthError::Foreign(text);
    let der = |pem: &str| {
        CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| foreign(error.to_string()))
    };
    let (certificate, authority) = (der(certificate_pem)?, der(authority_pem)?);
    let parse = |der| x509_parser::parse_x509_certificate(der).map_err(|error| foreign(error.to_string()));
    let ((_, certificate), (_, authority)) = (parse(&certificate)?, parse(&authority)?);
    let valid = certificate.validity();
    let signed = certificate.issuer() == authority.subject();
    Ok((valid.not_before.timestamp(), valid.not_after.timestamp(), signed))
}
