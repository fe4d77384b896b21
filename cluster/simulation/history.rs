//! What clients asked and were answered, and whether it can be true: names of images as registers, VMs with their generations.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blixard_api::VmId;
use blixard_api::vm::Desired;

use crate::linear::{Call, Model, is_linearizable};

/// What a name of an image points to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageOp {
    /// It points to this content from now on.
    Put(u64),
    /// It is deleted; answers whether it was there.
    Delete(Option<bool>),
    /// What it points to.
    Read(Option<u64>),
}

struct Image;

impl Model for Image {
    type State = Option<u64>;
    type Op = ImageOp;

    fn after(state: &Option<u64>, op: &ImageOp) -> Vec<Option<u64>> {
        let if_so = |so: bool, state| if so { vec![state] } else { Vec::new() };
        match op {
            ImageOp::Put(content) => vec![Some(*content)],
            ImageOp::Delete(was_there) => if_so(was_there.is_none_or(|was| was == state.is_some()), None),
            ImageOp::Read(found) => if_so(found == state, *state),
        }
    }
}

/// A VM as a client sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Seen {
    /// It shall run.
    Running(u64),
    /// It shall not run.
    Stopped(u64),
    /// It shall be gone.
    Gone(u64),
}

impl Seen {
    /// What it shall do, with its generation.
    pub fn new(desired: Desired, generation: u64) -> Self {
        match desired {
            Desired::Running => Self::Running(generation),
            Desired::Stopped => Self::Stopped(generation),
            Desired::Gone => Self::Gone(generation),
        }
    }
}

/// The answer to a change of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Nobody knows.
    Nothing,
    /// It is like this now.
    Vm(Seen),
    /// There is no such VM.
    NoVm,
    /// It shall be gone.
    Leaving,
    /// It has another generation.
    Generation(u64),
}

/// A request about a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmOp {
    /// Make it.
    Create(Told),
    /// Run it, if it has this generation.
    Start(Option<u64>, Told),
    /// Stop it, if it has this generation.
    Stop(Option<u64>, Told),
    /// Remove it.
    Delete(Told),
    /// Look at it.
    Read(Option<Seen>),
}

struct Vm;

impl Vm {
    /// How it may be, with the answer.
    fn changed(state: Option<Seen>, op: &VmOp) -> Vec<(Option<Seen>, Told)> {
        let same = |seen| vec![(Some(seen), Told::Vm(seen))];
        let to = |seen| vec![(Some(seen), Told::Vm(seen))];
        match (op, state) {
            (VmOp::Create(_), None) => to(Seen::Running(1)),
            // Its id is known to one client, which asks for it once.
            (VmOp::Create(_), Some(_)) | (VmOp::Read(_), _) => Vec::new(),
            (_, None) => vec![(None, Told::NoVm)],
            (VmOp::Start(Some(wanted), _) | VmOp::Stop(Some(wanted), _), Some(seen))
                if *wanted != seen.generation() =>
            {
                vec![(state, Told::Generation(seen.generation()))]
            }
            (VmOp::Start(..) | VmOp::Stop(..), Some(Seen::Gone(_))) => vec![(state, Told::Leaving)],
            (VmOp::Start(..), Some(Seen::Stopped(generation))) => to(Seen::Running(generation + 1)),
            // One that has ended begins anew.
            (VmOp::Start(..), Some(seen @ Seen::Running(generation))) => {
                [same(seen), to(Seen::Running(generation + 1))].concat()
            }
            (VmOp::Stop(..), Some(Seen::Running(generation))) => to(Seen::Stopped(generation + 1)),
            (VmOp::Stop(..), Some(seen @ Seen::Stopped(_))) => same(seen),
            (VmOp::Delete(_), Some(seen @ Seen::Gone(_))) => same(seen),
            (VmOp::Delete(_), Some(seen)) => to(Seen::Gone(seen.generation() + 1)),
        }
    }
}

impl Seen {
    /// How often it has changed.
    pub fn generation(self) -> u64 {
        match self {
            Self::Running(generation) | Self::Stopped(generation) | Self::Gone(generation) => generation,
        }
    }
}

impl Model for Vm {
    type State = Option<Seen>;
    type Op = VmOp;

    fn after(state: &Option<Seen>, op: &VmOp) -> Vec<Option<Seen>> {
        // What shall be gone is gone at any time.
        let gone = matches!(state, Some(Seen::Gone(_))).then_some(None);
        let from = [Some(*state), gone].into_iter().flatten();
        from.flat_map(|state| match op {
            VmOp::Read(found) if *found == state => vec![state],
            VmOp::Read(_) => Vec::new(),
            VmOp::Create(told) | VmOp::Start(_, told) | VmOp::Stop(_, told) | VmOp::Delete(told) => {
                let fits = |answer: &Told| *told == Told::Nothing || answer == told;
                Self::changed(state, op)
                    .into_iter()
                    .filter(|(_, answer)| fits(answer))
                    .map(|(s, _)| s)
                    .collect()
            }
        })
        .collect()
    }
}

#[derive(Debug, Default)]
struct Inner {
    time: u64,
    images: BTreeMap<String, Vec<Call<ImageOp>>>,
    /// With their names.
    vms: BTreeMap<VmId, (String, Vec<Call<VmOp>>)>,
}

/// The history of one run. Clones are the same one.
#[derive(Debug, Clone, Default)]
pub struct History(Arc<Mutex<Inner>>);

impl History {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A moment after all before it.
    pub fn moment(&self) -> u64 {
        let mut inner = self.inner();
        inner.time += 1;
        inner.time
    }

    /// A request about an image; `known` when its answer is.
    pub fn image(&self, name: &str, begin: u64, known: bool, op: ImageOp) {
        let end = known.then(|| self.moment());
        self.inner().images.entry(name.to_owned()).or_default().push(Call { begin, end, op });
    }

    /// A request about a VM; `known` when its answer is.
    pub fn vm(&self, vm: VmId, name: &str, begin: u64, known: bool, op: VmOp) {
        let end = known.then(|| self.moment());
        let mut inner = self.inner();
        let (_, calls) = inner.vms.entry(vm).or_insert_with(|| (name.to_owned(), Vec::new()));
        calls.push(Call { begin, end, op });
    }

    /// All VMs that were asked for.
    pub fn vms(&self) -> Vec<(VmId, String)> {
        self.inner().vms.iter().map(|(vm, (name, _))| (*vm, name.clone())).collect()
    }

    /// What cannot be true, and how many answered requests were looked at.
    pub fn judge(&self) -> (Vec<String>, usize) {
        let inner = self.inner();
        let mut wrong = Vec::new();
        for (name, calls) in &inner.images {
            if !is_linearizable::<Image>(None, calls) {
                wrong.push(format!("what clients saw of image {name} is not linearizable: {calls:?}"));
            }
        }
        for (vm, (name, calls)) in &inner.vms {
            if !is_linearizable::<Vm>(None, calls) {
                wrong.push(format!("what clients saw of VM {name} ({vm}) is not linearizable: {calls:?}"));
            }
        }
        let images = inner.images.values().flatten().filter(|call| call.end.is_some()).count();
        let vms = inner.vms.values().flat_map(|(_, calls)| calls).filter(|call| call.end.is_some()).count();
        (wrong, images + vms)
    }
}
