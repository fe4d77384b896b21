//! The journal through crashes at every byte, and with damage.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use redb::backends::InMemoryBackend;

use super::*;

const CAPACITY: usize = 8 << 10;

/// A file that outlives the journal that writes it, and whether its next flush fails.
#[derive(Debug, Clone, Default)]
struct Shared(Arc<InMemoryBackend>, Arc<AtomicBool>);

impl StorageBackend for Shared {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        match self.1.swap(false, Ordering::SeqCst) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => self.0.sync_data(),
        }
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }
}

impl Shared {
    fn new() -> Self {
        let file = Self::default();
        drop(Journal::open(Box::new(file.clone()), CAPACITY, 0, true).unwrap());
        file
    }

    fn content(&self) -> Vec<u8> {
        let mut content = vec![0; CAPACITY];
        self.0.read(0, &mut content).unwrap();
        content
    }

    fn with(content: &[u8]) -> Self {
        let file = Self::default();
        file.0.set_len(u64::try_from(content.len()).unwrap()).unwrap();
        file.0.write(0, content).unwrap();
        file
    }

    fn open(&self, generation: u64) -> io::Result<(Journal, Vec<Op>)> {
        Journal::open(Box::new(self.clone()), CAPACITY, generation, false)
    }
}

fn entry(index: u64) -> Op {
    Op::Entry(index, vec![u8::try_from(index % 251).unwrap(); 700])
}

fn all_kinds() -> Vec<Op> {
    vec![entry(7), Op::Vote(b"{}".to_vec()), Op::TruncateFrom(7), Op::Purge(3, b"[]".to_vec())]
}

#[test]
fn what_was_flushed_comes_back_until_the_database_has_it() {
    let file = Shared::new();
    let (mut journal, found) = file.open(0).unwrap();
    assert_eq!(found, []);
    assert!(journal.append(all_kinds().iter()).unwrap());
    assert!(journal.append([entry(8)].iter()).unwrap());
    let mut expected = all_kinds();
    expected.push(entry(8));
    assert_eq!(file.open(0).unwrap().1, expected);
    assert_eq!(file.open(1).unwrap().1, [], "the database has generation 1");
    journal.stored();
    assert!(journal.append([entry(9)].iter()).unwrap());
    assert_eq!(file.open(1).unwrap().1, [entry(9)]);
    let (_, found) = Journal::open(Box::new(file.clone()), CAPACITY, 1, true).unwrap();
    assert_eq!(found, [], "it was another database's");
}

#[test]
fn a_record_without_room_is_refused_and_the_rest_stays() {
    let file = Shared::new();
    let (mut journal, _) = file.open(0).unwrap();
    let mut count = 0;
    while journal.append([entry(count)].iter()).unwrap() {
        count += 1;
    }
    assert_eq!(count, 8, "each takes two sectors");
    assert_eq!(file.open(0).unwrap().1.len(), 8);
}

#[test]
fn a_record_torn_at_any_byte_never_was_and_those_before_it_stay() {
    let file = Shared::new();
    let (mut journal, _) = file.open(0).unwrap();
    assert!(journal.append([entry(1)].iter()).unwrap());
    let before = file.content();
    assert!(journal.append([entry(2)].iter()).unwrap());
    let after = file.content();
    for cut in 1024..1024 + HEAD + 712 {
        let torn = [&after[..cut], &before[cut..]].concat();
        let (mut journal, found) = Shared::with(&torn).open(0).unwrap();
        assert_eq!(found, [entry(1)], "{cut}");
        assert!(journal.append([entry(3)].iter()).unwrap());
    }
}

#[test]
fn damage_before_a_good_record_is_told_and_not_taken_for_the_end() {
    let file = Shared::new();
    let (mut journal, _) = file.open(0).unwrap();
    for index in 1..4 {
        assert!(journal.append([entry(index)].iter()).unwrap());
    }
    let good = file.content();
    for at in 0..2 * 1024 {
        let mut content = good.clone();
        content[at] ^= 0x10;
        let used = HEAD + 1 + 8 + 4 + 700;
        match Shared::with(&content).open(0) {
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{at}"),
            Ok((_, found)) => assert!(at % 1024 >= used && found.len() == 3, "{at}"),
        }
    }
}

#[test]
fn a_missing_or_cut_journal_of_a_database_that_has_one_is_told() {
    assert!(Shared::default().open(0).is_err());
    assert!(Shared::with(&[0; CAPACITY - 1]).open(0).is_err());
}

#[test]
fn after_a_failed_flush_nothing_is_accepted() {
    let file = Shared::new();
    let (mut journal, _) = file.open(0).unwrap();
    file.1.store(true, Ordering::SeqCst);
    assert!(journal.append([entry(1)].iter()).is_err());
    assert!(journal.append([entry(2)].iter()).is_err(), "the disk works again, and nobody knows what it has");
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..600), at in 0..4_usize) {
        let mut content = vec![0; CAPACITY];
        let mut head = [MAGIC.as_slice(), &u32::try_from(bytes.len()).unwrap().to_le_bytes(), &1_u64.to_le_bytes(),
            &0_u64.to_le_bytes(), &[0; 8]].concat();
        head.extend(&bytes);
        let sum = checksum(&head);
        head.splice(SUM, sum);
        content[at * SECTOR..at * SECTOR + head.len()].copy_from_slice(&head);
        let _ = Shared::with(&content).open(0);
    }
}
