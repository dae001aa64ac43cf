//! Scenarios of changes in any order, and of maps that do not take them: what the kernel holds in the end is what the objects mean, and
//! what it held before is whole until then. Needs root.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use proxy_common::{
    addr::{Address, Ipv4, Port, Protocol},
    service::{Frontend, Service},
};
use proxy_userspace::{
    dataplane::netlink::NodeNetwork,
    diff::{Capacity, FamilyState, KernelState},
    model::ObjectName,
    reconcile::{Reconciler, Settings},
    source::{self, Event},
};
use serde_json::{Value, json};
use tests::{
    api::{
        ApiServer, Resource,
        object::{self, slice},
    },
    freeze::freeze,
    http::ask,
    interleaving::{Change, Meaning, World, node},
    lab::memory::MemoryCgroup,
    patience::wait_until,
    picture::{Picture, Testimony, Witness},
    sandbox::{Agent, Sandbox},
    scenario::note,
};

const USUAL: Duration = Duration::from_mins(1);

/// Changes of a case.
const CHANGES: usize = 8;

/// How many cases of those that SCENARIOS asks for there is time for, unless it is said otherwise.
const CASES: usize = 1_000;
/// How many of them with an agent and the kernel's maps.
const SAMPLE: usize = 25;

fn event(change: Change) -> Result<Event> {
    fn changed<T: serde::de::DeserializeOwned>(object: Value) -> Result<source::Change<T>> {
        Ok(source::Change::Apply(Box::new(serde_json::from_value(object)?)))
    }
    Ok(match change {
        Change::Apply(object) if object["kind"] == "Service" => Event::Services(changed(object)?),
        Change::Apply(object) if object["kind"] == "EndpointSlice" => Event::EndpointSlices(changed(object)?),
        Change::Apply(object) => Event::Nodes(changed(object)?),
        Change::Delete(resource, namespace, name) => {
            let name = ObjectName { namespace: namespace.into(), name: name.as_str().into() };
            match resource {
                Resource::Services => Event::Services(source::Change::Delete(name)),
                _ => Event::EndpointSlices(source::Change::Delete(name)),
            }
        }
    })
}

/// An agent's thoughts, without its hands.
struct Thinker {
    reconciler: Reconciler,
    kernel: KernelState,
    now: Instant,
}

impl Thinker {
    fn new() -> Result<Self> {
        let mut thinker = Self { reconciler: reconciler(), kernel: KernelState::default(), now: Instant::now() };
        thinker.start(&World::new(0))?;
        Ok(thinker)
    }

    /// As an agent that was started anew: it finds what is in the kernel, and is told everything.
    fn start(&mut self, world: &World) -> Result<()> {
        self.reconciler = reconciler();
        self.reconciler.adopt(self.kernel.clone(), self.now);
        self.reconciler.absorb_network(NodeNetwork { links: Vec::new(), addresses: Vec::new() });
        let (services, slices): (Vec<_>, Vec<_>) =
            world.objects().into_iter().partition(|object| object["kind"] == "Service");
        self.reconciler.absorb(Event::Services(source::Change::Replace(typed(services)?)));
        self.reconciler.absorb(Event::EndpointSlices(source::Change::Replace(typed(slices)?)));
        self.reconciler.absorb(Event::Nodes(source::Change::Replace(typed(vec![node("zone-a")])?)));
        self.reconciler.absorb(Event::ServiceCidrs(source::Change::Replace(Vec::new())));
        self.plan()
    }

    fn plan(&mut self) -> Result<()> {
        self.now += Duration::from_secs(1);
        let (plan, overflows) = self.reconciler.plan(self.now);
        ensure!(overflows.is_empty(), "{overflows:?}");
        self.kernel.carry_out(&plan);
        Ok(())
    }
}

fn reconciler() -> Reconciler {
    Reconciler::new(Settings { name: object::NODE.into(), ..Settings::default() }, Capacity::default())
}

fn typed<T: serde::de::DeserializeOwned>(objects: Vec<Value>) -> Result<Vec<T>> {
    objects.into_iter().map(|object| Ok(serde_json::from_value(object)?)).collect()
}

/// What maps mean.
fn read(kernel: &KernelState) -> Meaning {
    fn describe<A: Address + Into<IpAddr>>(state: &FamilyState<A>, slots: &[u32], meaning: &mut Meaning) {
        for (frontend, service) in &state.services {
            let protocol = match frontend.proto {
                Protocol::Tcp => "TCP",
                Protocol::Udp => "UDP",
                _ => continue,
            };
            let range = service.internal.first as usize..(service.internal.first + service.internal.count) as usize;
            let targets: BTreeSet<String> = range
                .map(|slot| &state.backends[slots[slot] as usize])
                .map(|backend| SocketAddr::new(backend.addr.into(), backend.port.number()).to_string())
                .collect();
            let name = SocketAddr::new(frontend.addr.into(), frontend.port.number());
            meaning.insert(format!("{name}/{protocol}"), targets);
        }
    }
    let mut meaning = Meaning::new();
    describe(&kernel.v4, &kernel.slots, &mut meaning);
    describe(&kernel.v6, &kernel.slots, &mut meaning);
    meaning
}

#[test]
fn scenario_07_any_interleaving_ends_with_maps_that_mean_what_the_objects_do() -> Result<()> {
    let cases = env::var("SLUICE_TEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(CASES);
    let began = Instant::now();
    let (mut world, mut thinker) = (World::new(7), Thinker::new()?);
    let mut endpoints = 0;
    for case in 0..cases {
        for number in 0..CHANGES {
            for change in world.happen() {
                let told = format!("{change:?}");
                let defects = thinker.reconciler.absorb(event(change)?);
                ensure!(defects.is_empty(), "case {case}: {defects:?} of {told}");
            }
            // Now and then in between.
            if (case + number) % 3 == 0 {
                thinker.plan()?;
            }
        }
        if case % 50 == 49 {
            thinker.start(&world)?;
        } else {
            thinker.plan()?;
        }
        let meaning = world.meaning();
        assert_eq!(read(&thinker.kernel), meaning, "case {case}");
        endpoints += meaning.values().map(BTreeSet::len).sum::<usize>();
    }
    ensure!(endpoints > cases, "{cases} worlds of {endpoints} endpoints are hardly any");
    note(
        7,
        &format!(
            "{cases} cases of {CHANGES} changes in {:?} without a kernel; SLUICE_TEST_CASES=100000 for more",
            began.elapsed()
        ),
    );
    Ok(())
}

fn is_meant(picture: &Picture, meaning: &Meaning) -> bool {
    picture.len() == meaning.len()
        && picture.iter().all(|(frontend, answers)| {
            meaning.get(frontend).is_some_and(|meant| answers.internal == *meant && answers.external == *meant)
        })
}

#[test]
fn scenario_07_a_sample_of_interleavings_on_the_kernels_maps() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = sandbox.server()?;
    server.apply(node("zone-a"))?;
    let mut agent = start(&sandbox, &server)?;
    let mut world = World::new(8);
    for case in 0..SAMPLE {
        for _ in 0..CHANGES {
            for change in world.happen() {
                match change {
                    Change::Apply(object) => server.apply(object)?,
                    Change::Delete(resource, namespace, name) => server.delete(resource, namespace, &name)?,
                }
            }
        }
        if case % 10 == 9 {
            drop(agent);
            agent = start(&sandbox, &server)?;
        }
        let meaning = world.meaning();
        sandbox
            .wait_for_picture("what the objects mean", |picture| is_meant(picture, &meaning))
            .with_context(|| format!("case {case}: {meaning:#?}"))?;
    }
    note(7, &format!("{SAMPLE} cases of {CHANGES} changes with an agent on the kernel's maps"));
    Ok(())
}

fn start(sandbox: &Sandbox, server: &ApiServer) -> Result<Agent> {
    let agent = sandbox.agent(&["--master", &server.url()])?;
    agent.wait_for("in sync")?;
    Ok(agent)
}

/// An old Service, and as many new ones as said, each with two endpoints.
fn serve(server: &ApiServer, services: u16) -> Result<()> {
    for number in 0..services {
        let [high, low] = number.to_be_bytes();
        server.apply(slice(&format!("s{number}"), &[&format!("10.5.{high}.{low}"), &format!("10.6.{high}.{low}")]))?;
        server.apply(object::service(&format!("s{number}"), &format!("10.97.{high}.{low}")))?;
    }
    Ok(())
}

fn filled(sandbox: &Sandbox) -> Result<ApiServer> {
    let server = sandbox.server()?;
    server.apply(object::node())?;
    server.apply(object::service("old", "10.96.0.1"))?;
    server.apply(slice("old", &["10.0.0.1", "10.0.0.2"]))?;
    Ok(server)
}

/// The old Service was the same all the time, and each new one had both its endpoints, or none: these are told apart from it.
fn assert_whole(testimony: &Testimony) {
    assert_eq!(testimony.seen["10.96.0.1:80/TCP"].len(), 1, "{:?}", testimony.seen["10.96.0.1:80/TCP"]);
    for (frontend, seen) in &testimony.seen {
        let halves: Vec<_> = seen.iter().flatten().filter(|answers| !matches!(answers.internal.len(), 0 | 2)).collect();
        assert!(halves.is_empty(), "{frontend} was half there: {halves:?}");
    }
}

#[test]
fn scenario_20_a_map_that_may_not_be_written_to_keeps_the_old_and_is_tried_again_and_again() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = filled(&sandbox)?;
    let agent = start(&sandbox, &server)?;
    let before = sandbox.picture()?;
    freeze(sandbox.pins.path(), "SERVICES_V4")?;
    let witness = Witness::of(sandbox.pins.path())?;
    serve(&server, 20)?;
    server.delete(Resource::Services, "test", "old")?;
    agent.wait_for("cannot write to map SERVICES_V4: Operation not permitted (os error 1); trying again in")?;
    agent.wait_for_count("trying again in", 3)?;
    let testimony = witness.testify()?;
    assert!(testimony.changes().is_empty(), "{:?}", testimony.changes());
    assert_eq!(sandbox.picture()?, before, "the old Service is whole");
    let metrics = ask(&sandbox.namespace, ([127, 0, 0, 1], 10_249).into(), "GET", "/metrics")?;
    ensure!(metrics.status == 200, "the agent does not answer");
    Ok(())
}

/// Fills a map of Services with what nobody wants, as another program would that takes the map for its own.
fn occupy(sandbox: &Sandbox) -> Result<u32> {
    let map = MapData::from_pin(sandbox.pins.path().join("maps/SERVICES_V4"))?;
    let mut map: HashMap<_, Frontend<Ipv4>, Service> = Map::HashMap(map).try_into()?;
    let mut count = 0_u32;
    loop {
        let [_, a, b, c] = count.to_be_bytes();
        let frontend = Frontend::new(Ipv4 { octets: [172, a, b, c] }, Port::new(9), Protocol::Tcp);
        if map.insert(frontend, Service::default(), 0).is_err() {
            return Ok(count);
        }
        count += 1;
    }
}

#[test]
fn scenario_20_a_map_that_another_program_has_filled_is_made_room_in() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = filled(&sandbox)?;
    let agent = start(&sandbox, &server)?;
    let count = occupy(&sandbox)?;
    ensure!(count > 1_000, "{count} entries");
    serve(&server, 20)?;
    agent.wait_for("map SERVICES_V4 is full")?;
    let is_healed = || sandbox.services().ok().filter(|services| services.len() == 21).map(drop);
    wait_until("the new Services, and nothing else", USUAL, is_healed).with_context(|| agent.log())?;
    assert!(sandbox.picture()?.values().all(|answers| answers.internal.len() == 2));
    note(20, &format!("E2BIG by {count} foreign entries: they went, and 21 Services were whole"));
    Ok(())
}

#[test]
fn scenario_20_a_kernel_without_memory_for_maps_keeps_the_old_whole_until_there_is_some() -> Result<()> {
    const NEW: u16 = 3_000;
    let sandbox = Sandbox::new()?;
    let server = filled(&sandbox)?;
    let cgroup = match MemoryCgroup::new(20) {
        Ok(cgroup) => cgroup,
        Err(error) => {
            note(20, &format!("ENOMEM is not to be had here: {error:#}"));
            return Ok(());
        }
    };
    let mut command = sandbox.command(&["--master", &server.url()])?;
    command.arg("--cgroup").arg(sandbox.cgroup.path());
    cgroup.enter_on_exec(&mut command)?;
    let agent = sandbox.start(command)?;
    agent.wait_for("in sync")?;
    // Maps stay where they were made; what the agent allocates from now on counts elsewhere.
    cgroup.release(agent.id())?;
    cgroup.shrink()?;
    let witness = Witness::of(sandbox.pins.path())?;
    serve(&server, NEW)?;
    agent.wait_for("Cannot allocate memory (os error 12); trying again in")?;
    agent.wait_for_count("trying again in", 2)?;
    let reached = sandbox.picture()?.len();
    ensure!(reached <= usize::from(NEW), "there was room for all");
    cgroup.limit(8 << 30)?;
    wait_until("all Services", USUAL, || {
        sandbox.picture().ok().filter(|picture| picture.len() == usize::from(NEW) + 1).map(drop)
    })
    .with_context(|| agent.log())?;
    assert_whole(&witness.testify()?);
    note(
        20,
        &format!("ENOMEM after {reached} of {NEW} Services; the rest came with memory, and none was ever half there"),
    );
    Ok(())
}

/// A Service of so many ports at its ClusterIP and at so many external IPs.
fn wide(name: &str, number: u8, ports: u16, external: u8) -> Value {
    let mut service = object::service(name, &format!("10.96.1.{number}"));
    let ports: Vec<_> = (0..ports).map(|port| json!({"name": format!("p{port}"), "port": 1_000 + port})).collect();
    let addresses: Vec<_> = (0..external).map(|host| format!("203.0.{number}.{host}")).collect();
    service["spec"]["ports"] = json!(ports);
    service["spec"]["externalIPs"] = json!(addresses);
    service
}

/// The entries of an old Service and of another one's ClusterIP, as they stand.
fn entries(sandbox: &Sandbox) -> Result<BTreeMap<Frontend<Ipv4>, Service>> {
    let is_old = |frontend: &Frontend<Ipv4>| matches!(frontend.addr.octets, [10, 96, 0 | 1, 1]);
    Ok(sandbox.services()?.into_iter().filter(|(frontend, _)| is_old(frontend)).collect())
}

#[test]
fn scenario_24_a_full_map_of_services_leaves_the_old_alone_and_heals_when_there_is_room() -> Result<()> {
    const WIDE: (usize, usize) = (1_000, 64);
    const THIRD: usize = 900;
    const LATE: usize = 100;
    let sandbox = Sandbox::new()?;
    let server = filled(&sandbox)?;
    let agent = start(&sandbox, &server)?;
    let room = Capacity::default().services as usize;
    // Each address also has an entry that stands for the ports it has not.
    let (ports, addresses) = (WIDE.0 as u16, WIDE.1 as u8);
    let taken = 2 + 2 * (WIDE.0 + 1) * (WIDE.1 + 1) + THIRD + 1;
    ensure!(taken < room && room - taken < LATE, "{room} entries, {taken} taken: the test is of another size");
    server.apply(wide("first", 1, ports, addresses))?;
    server.apply(wide("second", 2, ports, addresses))?;
    server.apply(wide("third", 3, THIRD as u16, 0))?;
    let wait_for = |count: usize| {
        let found = || sandbox.services().ok().filter(|services| services.len() == count).map(drop);
        wait_until(&format!("{count} frontends"), USUAL, found)
            .with_context(|| format!("there are {:?}", sandbox.services().map(|services| services.len())))
    };
    let frontends = 1 + 2 * WIDE.0 * (WIDE.1 + 1) + THIRD;
    wait_for(frontends)?;
    let before = entries(&sandbox)?;
    assert_eq!(before.len(), 1 + WIDE.0);
    server.apply(wide("late", 4, LATE as u16, 0))?;
    agent.wait_for("no room for test/late:")?;
    wait_until("the Event", USUAL, || {
        let told = |event: &Value| event["regarding"]["name"] == "late" && event["reason"] == "NoRoom";
        server.events().iter().any(told).then_some(())
    })?;
    assert_eq!(entries(&sandbox)?, before, "the old ones are untouched");
    let health = ([127, 0, 0, 1], 10_256).into();
    for path in ["/healthz", "/livez", "/readyz"] {
        assert_eq!(ask(&sandbox.namespace, health, "GET", path)?.status, 200, "{path}: the others are served");
    }
    server.delete(Resource::Services, "test", "second")?;
    wait_for(frontends - WIDE.0 * (WIDE.1 + 1) + LATE)?;
    assert_eq!(entries(&sandbox)?, before, "the old ones are untouched");
    note(
        24,
        &format!("{room} entries full: an Event about the loser, the old ones untouched, healed without a restart"),
    );
    Ok(())
}
