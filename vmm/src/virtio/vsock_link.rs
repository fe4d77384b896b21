//! The guest link: the stream that the guest's init opens to the VMM itself ([`blixard_vmm_api`] says what it carries).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use blixard_vmm_api::guest::{Identity, LinkRecord, NotALinkRecord};

use super::turn::Turn;

/// Most records that wait for the guest.
const WAITING_MAX: usize = 16;
/// Most records of one connection: init sends a handful, so a guest that sends more is not our init.
const RECORDS_MAX: u32 = 64;

/// Records on their way to the guest.
pub(super) type Outbox = Arc<Mutex<VecDeque<LinkRecord>>>;

/// Sends records to the guest, from any thread.
pub struct LinkSender {
    outbox: Outbox,
    turn: Turn,
}

impl LinkSender {
    pub(super) fn new(outbox: Outbox, turn: Turn) -> Self {
        Self { outbox, turn }
    }

    /// Sends `record` as soon as the guest has its link open. A record that is waiting already is not sent twice; behind
    /// sixteen waiting ones it is dropped.
    pub fn send(&self, record: LinkRecord) {
        let mut waiting = self.outbox.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < WAITING_MAX && !waiting.contains(&record) {
            waiting.push_back(record);
        }
        drop(waiting);
        self.turn.ask();
    }
}

/// Our end of one connection.
pub(super) struct LinkEnd {
    inbound: Vec<u8>,
    records: u32,
    outbox: Outbox,
}

impl LinkEnd {
    pub(super) fn new(outbox: &Outbox) -> Self {
        Self { inbound: Vec::new(), records: 0, outbox: Arc::clone(outbox) }
    }

    /// Takes bytes from the guest; calls `each` with the records in them.
    pub(super) fn take(
        &mut self,
        bytes: &[u8],
        each: &mut dyn FnMut(LinkRecord),
    ) -> Result<(), NotALinkRecord> {
        self.inbound.extend_from_slice(bytes);
        while let Some(record) = LinkRecord::decode(&mut self.inbound)? {
            self.records += 1;
            if self.records > RECORDS_MAX {
                return Err(NotALinkRecord { kind: 0, length: 0 });
            }
            each(record);
        }
        Ok(())
    }

    pub(super) fn has_records(&self) -> bool {
        !self.outbox.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// The next record as bytes.
    pub(super) fn next_record(&self) -> Option<Vec<u8>> {
        let mut waiting = self.outbox.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.pop_front().map(|record| match record {
            // It may have waited for the guest to come back: the time is that of now.
            LinkRecord::Restored(identity) => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                let unix_ns = u64::try_from(now.as_nanos()).unwrap_or(0);
                LinkRecord::Restored(Identity { unix_ns, ..identity }).encode()
            }
            record => record.encode(),
        })
    }
}
