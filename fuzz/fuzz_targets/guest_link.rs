//! What a guest can send on the guest link: records in any cut never panic, and what decodes encodes to itself.
#![no_main]

use blixard_vmm_api::guest::LinkRecord;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut buffer = Vec::new();
    for part in data.chunks(7) {
        buffer.extend_from_slice(part);
        loop {
            match LinkRecord::decode(&mut buffer) {
                Ok(Some(record)) => {
                    let mut again = record.encode();
                    if let Ok(Some(same)) = LinkRecord::decode(&mut again) {
                        // A problem text is lossy only where it was not UTF-8 or too long after repair.
                        assert!(same == record || matches!(record, LinkRecord::Problem(_)));
                    }
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
        assert!(buffer.len() <= LinkRecord::HEADER + LinkRecord::PAYLOAD_MAX + 7);
    }
});
