//! What a client can send to init, and a guest to a CLI: exec frames.
#![no_main]

use blixard_vmm_api::guest::frame::{Frame, HEADER, decode_header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((header, rest)) = data.split_first_chunk::<HEADER>() else { return };
    let Ok((kind, length)) = decode_header(*header) else { return };
    let payload = rest.get(..length).unwrap_or(rest).to_vec();
    if let Ok(frame) = Frame::decode(kind, payload, |t| serde_json::from_slice(t).ok()) {
        let _ = frame.encode(|r| serde_json::to_vec(r).ok());
    }
});
