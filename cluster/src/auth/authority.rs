//! The cluster's certificate authority: made once, signs a certificate for each node.
//!
//! Keys are Ed25519 (RFC 8410). A node's certificate names it twice, as `node-N.CLUSTER` and `node.CLUSTER`: who connects to
//! a certain node asks for the first name, who only wants to meet a node of the cluster for the second.

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ED25519, PublicKeyData, SignatureAlgorithm,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::{AuthError, sha256_hex};
use crate::state::NodeId;
use crate::state::records::{Authority, TrustRecord};

/// How long a node's certificate is valid.
pub const NODE_VALID: Duration = Duration::from_secs(90 * 24 * 60 * 60);
/// A certificate is renewed when less than this is left of it.
pub const RENEW_BEFORE: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// How long an authority is valid.
const AUTHORITY_VALID: Duration = Duration::from_secs(20 * 365 * 24 * 60 * 60);
/// Clocks of nodes may differ by this much.
const CLOCK_SLACK: Duration = Duration::from_secs(60 * 60);

/// The name by which a certain node is met.
pub fn node_name(cluster: &str, node: NodeId) -> String {
    format!("node-{node}.{cluster}")
}

/// The name by which any node of the cluster is met.
pub fn any_node_name(cluster: &str) -> String {
    format!("node.{cluster}")
}

/// A new identity for a cluster: lower-case letters and digits, so that it can be part of a host name.
pub fn cluster_id(now_ms: u64, random: &str) -> String {
    let random = random.get(..20).and_then(|hex| u128::from_str_radix(hex, 16).ok()).unwrap_or(0);
    ulid::Ulid::from_parts(now_ms, random).to_string().to_ascii_lowercase()
}

/// Trust for a new cluster.
///
/// # Errors
/// See [`AuthError`].
pub fn begin(cluster: &str, now_ms: u64) -> Result<TrustRecord, AuthError> {
    let authority = make(cluster, now_ms)?;
    Ok(TrustRecord { cluster: cluster.to_owned(), version: 1, authorities: vec![authority], signer: 0 })
}

/// A new authority.
///
/// # Errors
/// See [`AuthError`].
pub fn make(cluster: &str, now_ms: u64) -> Result<Authority, AuthError> {
    let key = KeyPair::generate_for(&PKCS_ED25519)?;
    let certificate = authority_params(cluster, now_ms).self_signed(&key)?;
    Ok(Authority {
        certificate_pem: certificate.pem(),
        sha256: sha256_hex(certificate.der()),
        created_at_ms: now_ms,
        key_pem: key.serialize_pem().into(),
    })
}

fn authority_params(cluster: &str, created_at_ms: u64) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    // The moment tells two authorities of one cluster apart.
    params.distinguished_name.push(DnType::CommonName, format!("blixard {cluster} {created_at_ms}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let (begin, created) = (rcgen::date_time_ymd(1970, 1, 1), Duration::from_millis(created_at_ms));
    params.not_before = begin + created.saturating_sub(CLOCK_SLACK);
    params.not_after = begin + created.saturating_add(AUTHORITY_VALID);
    params
}

/// The 32 bytes of an Ed25519 public key.
struct NodeKey([u8; 32]);

impl PublicKeyData for NodeKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ED25519
    }
}

/// A certificate (PEM) for the node with this public key (hexadecimal), by the authority that signs at present.
///
/// # Errors
/// See [`AuthError`].
pub fn certify(
    trust: &TrustRecord,
    node: NodeId,
    public_key: &str,
    now_ms: u64,
    valid: Duration,
) -> Result<String, AuthError> {
    let foreign = |text: &str| AuthError::Foreign(text.to_owned());
    let signer = trust.signer().ok_or_else(|| foreign("no authority signs"))?;
    let key = NodeKey(public_key_bytes(public_key).ok_or_else(|| foreign("no Ed25519 public key"))?);
    let issuer_key = KeyPair::from_pem(signer.key_pem.reveal())?;
    let issuer = Issuer::new(authority_params(&trust.cluster, signer.created_at_ms), issuer_key);
    let mut params =
        CertificateParams::new(vec![node_name(&trust.cluster, node), any_node_name(&trust.cluster)])?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, node_name(&trust.cluster, node));
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let (begin, now) = (rcgen::date_time_ymd(1970, 1, 1), Duration::from_millis(now_ms));
    params.not_before = begin + now.saturating_sub(CLOCK_SLACK);
    params.not_after = begin + now.saturating_add(valid);
    Ok(params.signed_by(&key, &issuer)?.pem())
}

/// The bytes of a public key in hexadecimal.
pub fn public_key_bytes(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

/// The certificates of all authorities that are trusted at present.
///
/// # Errors
/// [`AuthError::Foreign`].
pub fn roots(pem: &str) -> Result<Vec<CertificateDer<'static>>, AuthError> {
    let roots: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    roots.map_err(|error| AuthError::Foreign(error.to_string()))
}
