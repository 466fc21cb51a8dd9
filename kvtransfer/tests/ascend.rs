//! Whole transfers between the memories of two emulated NPUs, the sender in a process of its own: this test binary,
//! started as a child. The emulator (`baton-ascend-emulator`) lies beside the test binary, where Cargo puts it.

mod support;

use std::{
    ffi::{CString, c_char, c_int, c_void},
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::fs::symlink,
    process::{Child, Command, Stdio},
    ptr::{NonNull, null_mut},
    sync::Arc,
    time::Duration,
};

use baton_ascend_emulator::fault::{self, Fault};
use baton_kvtransfer::{
    AscendConfig, DataPortConfig, DeviceMemory, KvNode, Limits, NodeConfig, Plaintext, TransferError,
    TransportConfig,
};
use baton_proto::{Incarnation, TransferId, v1};
use libloading::os::unix::{Library, Symbol};
use support::{caches::*, scripted::*, *};
use tempfile::TempDir;

const SENDER: &str = "BATON_TEST_ASCEND_SENDER";
/// Neighbours at both ends, at one, and at none.
const FROM: [u32; 5] = [7, 8, 60, 61, 0];
const TO: [u32; 5] = [1, 2, 50, 49, 3];

/// There is one emulator, with one fault at a time, for all tests of this process: they take turns.
static TURNS: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// The emulator under some of the libraries' names.
struct Installed {
    folder: TempDir,
    library: Library,
}

impl Installed {
    fn new(names: &[&str]) -> Self {
        let file = std::env::current_exe().expect("this test").with_file_name("libbaton_ascend_emulator.so");
        let folder = TempDir::new().expect("a folder");
        for name in names {
            symlink(&file, folder.path().join(name)).expect("a link");
        }
        // SAFETY: the emulator has nothing that runs when it is loaded.
        let library = unsafe { Library::new(&file) }.expect("the emulator is built with the tests");
        Self { folder, library }
    }

    fn get<T>(&self, name: &str) -> Symbol<T> {
        // SAFETY: the callers below name the functions' true signatures.
        unsafe { self.library.get(name) }.expect("there")
    }

    fn fault(&self, fault: Option<Fault>) {
        let set: Symbol<unsafe extern "C" fn(*const c_char) -> c_int> = self.get(fault::SET);
        let name = CString::new(fault.map_or("", Fault::name)).expect("a name");
        // SAFETY: a C string.
        assert_eq!(unsafe { set(name.as_ptr()) }, 0);
    }

    fn pool(&self) -> Arc<Pool> {
        let malloc: Symbol<unsafe extern "C" fn(*mut *mut c_void, usize, c_int) -> c_int> =
            self.get("aclrtMalloc");
        let copy: Symbol<CopyFn> = self.get("aclrtMemcpy");
        let set: Symbol<unsafe extern "C" fn(i32) -> c_int> = self.get("aclrtSetDevice");
        let init: Symbol<unsafe extern "C" fn(*const c_char) -> c_int> = self.get("aclInit");
        // SAFETY: as documented: initialised (again does no harm), then a device for this thread.
        unsafe {
            init(std::ptr::null());
            assert_eq!(set(0), 0);
        }
        let allocate = |bytes: usize| {
            let mut start = null_mut();
            // SAFETY: `start` may be written.
            assert_eq!(unsafe { malloc(&mut start, bytes, 0) }, 0);
            let start: NonNull<u8> = NonNull::new(start.cast()).expect("memory");
            // SAFETY: so many bytes, which nobody else has.
            unsafe { start.write_bytes(0, bytes) };
            start
        };
        Pool::on_device(&layout(), BLOCKS, Arc::new(Emulated { copy: *copy, set: *set }), allocate)
    }

    fn config(&self) -> AscendConfig {
        // A port that is free at this moment, on an address of this process alone.
        let [_, a, b, c] = std::process::id().to_be_bytes();
        let host = Ipv4Addr::new(127, a | 0x40, b, c);
        let port = TcpListener::bind((host, 0)).expect("a port").local_addr().expect("bound").port();
        AscendConfig {
            device: 0,
            host: SocketAddr::from((host, port)),
            address: Some("29.1.2.3".parse().expect("an address")),
            trusted_network: true,
            libraries: Some(self.folder.path().into()),
        }
    }

    /// A node that would take HIXL if it could have it, and HCCL if not.
    fn peer(&self, name: &str) -> Peer {
        Peer::start_with(name, self.setup())
    }

    fn setup(&self) -> Setup {
        let config = self.config();
        let lease = Duration::from_secs(1);
        let limits = Limits { data_stall: lease, ..Limits::for_lease(lease) };
        Setup {
            lease,
            transports: vec![TransportConfig::Hixl(config.clone()), TransportConfig::Hccl(config)],
            pool: Some(self.pool()),
            limits,
            ..Setup::default()
        }
    }
}

type CopyFn = unsafe extern "C" fn(*mut c_void, usize, *const c_void, usize, c_int) -> c_int;

/// How the CPU looks into the emulated device's memory.
struct Emulated {
    copy: CopyFn,
    set: unsafe extern "C" fn(i32) -> c_int,
}

impl DeviceMemory for Emulated {
    fn copy_out(&self, from: NonNull<u8>, into: &mut [u8]) -> io::Result<()> {
        const TO_HOST: c_int = 2;
        // SAFETY: a device id; then memory of that device, as the caller promises, and as much room on the host.
        let status = unsafe {
            (self.set)(0);
            (self.copy)(into.as_mut_ptr().cast(), into.len(), from.as_ptr().cast(), into.len(), TO_HOST)
        };
        if status == 0 { Ok(()) } else { Err(io::Error::other(format!("aclrtMemcpy failed with {status}"))) }
    }
}

/// Not a test of its own: the process that sends, three transfers one after the other. Its libraries and the receiver come
/// through the environment; as an ordinary test it has nothing to do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sender() {
    let Ok(told) = std::env::var(SENDER) else { return };
    let mut words = told.split(' ');
    let (Some(names), Some(decode)) = (words.next(), words.next()) else { panic!("not told enough: {told}") };
    let prefill = Installed::new(&names.split(',').collect::<Vec<_>>()).peer("prefill-0");
    for id in words {
        let id = TransferId::from_bytes(std::array::from_fn(|at| {
            u8::from_str_radix(&id[2 * at..2 * at + 2], 16).expect("hex")
        }));
        let mut spec = offer_spec(id, &prefill, &FROM);
        (spec.peer, spec.receiver) = (decode.into(), instance("decode-0"));
        let mut outgoing = prefill.node.offer(spec).expect("room");
        for layer in 0..LAYERS {
            prefill.fill_layer(9, layer, &FROM, 0..5);
            outgoing.progress().ready(layer, 0..5);
        }
        outgoing.seal(1);
        let _ = outgoing.finished().await;
        assert_eq!(within("the fence", 10, outgoing.close()).await, FROM);
    }
    std::future::pending::<()>().await;
}

/// Ended also when the test fails.
struct Sender(Child);

impl Sender {
    fn start(names: &[&str], to: &Peer, ids: &[TransferId]) -> Self {
        let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
        let told = format!("{} {} {}", names.join(","), to.address, ids.join(" "));
        let this = std::env::current_exe().expect("this test");
        let mut child = Command::new(this);
        child.args(["--exact", "sender", "--nocapture"]).env(SENDER, told).stdout(Stdio::null());
        Self(child.spawn().expect("this test starts"))
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn carried(node: &KvNode) -> Vec<(&'static str, u64)> {
    let by_transport = node.stats().by_transport;
    by_transport.iter().map(|one| (one.kind.name(), one.slices_received)).filter(|(_, n)| *n > 0).collect()
}

const ALL: [&str; 3] = ["libacl_rt.so", "libcann_hixl.so", "libhcomm.so"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn caches_cross_between_the_memories_of_two_devices() {
    let _turn = TURNS.lock().await;
    for (names, kind) in [(&ALL[..], "hixl"), (&[ALL[0], ALL[2]][..], "hccl")] {
        let decode = Installed::new(names).peer("decode-0");
        let ids = [TransferId::generate(), TransferId::generate()];
        let _sender = Sender::start(names, &decode, &ids);
        for id in ids {
            let spec = expect_spec(id, &instance("prefill-0"), &TO);
            let mut incoming = decode.node.expect(spec).expect("room");
            within("sealed", 20, incoming.sealed()).await.expect(kind);
            assert!(decode.holds(9, &TO), "{kind}");
            assert_eq!(incoming.close().await, TO);
        }
        assert_eq!(carried(&decode.node), [(kind, 2 * 5 * u64::from(LAYERS))]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_batch_ends_its_transfer_and_the_next_one_takes_another_way() {
    let _turn = TURNS.lock().await;
    for fault in [Fault::BatchFails, Fault::BatchNeverCompletes, Fault::QueueExhausted] {
        let installed = Installed::new(&ALL);
        let decode = installed.peer("decode-0");
        let ids = [TransferId::generate(), TransferId::generate()];
        installed.fault(Some(fault));
        let _sender = Sender::start(&ALL, &decode, &ids);
        let mut incoming =
            decode.node.expect(expect_spec(ids[0], &instance("prefill-0"), &TO)).expect("room");
        let error = within("the failure", 20, incoming.sealed()).await.expect_err("it fails");
        assert!(matches!(error, TransferError::DataPath(_)), "{fault:?}: {error}");
        assert_eq!(within("the fence", 5, incoming.close()).await, TO);
        // HIXL has failed once, so HCCL is tried first.
        let mut incoming =
            decode.node.expect(expect_spec(ids[1], &instance("prefill-0"), &TO)).expect("room");
        within("sealed", 20, incoming.sealed()).await.expect("another way");
        assert!(decode.holds(9, &TO), "{fault:?}");
        installed.fault(None);
    }
}

#[tokio::test]
async fn memory_of_a_device_does_not_travel_in_ways_that_the_cpu_must_read() {
    let installed = Installed::new(&ALL);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let config = NodeConfig {
        instance_id: instance("decode-0"),
        incarnation: Incarnation(1),
        layout: layout(),
        region: installed.pool().region(),
        blocks: BLOCKS,
        data_port: DataPortConfig::new(listener),
        transports: vec![TransportConfig::Shm, TransportConfig::Tcp { connections: 1 }],
        dial: Arc::new(Plaintext),
        secret: None,
        convert: false,
        lease: Duration::from_secs(5),
        limits: Limits::for_lease(Duration::from_secs(5)),
        reclaim: Arc::new(|_| {}),
    };
    let error = KvNode::start(config, Default::default()).expect_err("nothing is left");
    assert!(error.to_string().contains("a device's memory"), "{error}");
}

/// Its library takes no credential.
#[tokio::test]
async fn hixl_is_left_out_unless_its_network_is_trusted() {
    let _turn = TURNS.lock().await;
    let installed = Installed::new(&ALL);
    for (trusted_network, told) in [(false, &["tcp"][..]), (true, &["hixl", "tcp"])] {
        let hixl = TransportConfig::Hixl(AscendConfig { trusted_network, ..installed.config() });
        let transports = vec![hixl, TransportConfig::Tcp { connections: 1 }];
        let decode = Peer::start_with("decode-0", Setup { transports, ..Setup::default() });
        let transports = decode.node.transports();
        assert_eq!(transports.iter().map(|(kind, _)| kind.name()).collect::<Vec<_>>(), told);
    }
}

/// Slices that are mapped on arrival do not go where a card or an NPU would put them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mapped_pairs_leave_out_the_transports_that_write_into_the_pool() {
    let _turn = TURNS.lock().await;
    let installed = Installed::new(&ALL);
    let (here, there) = (panel(Dtype::Bf16, 16), panel(Dtype::Bf16, 32));
    let setup = || Setup {
        layout: here.layout(),
        transports: vec![TransportConfig::Hixl(installed.config()), TransportConfig::Tcp { connections: 1 }],
        ..Setup::default()
    };
    // A receiver does not tell of them.
    let decode = Peer::start_with("decode-0", setup());
    for (form, told) in [(here, &["hixl", "tcp"][..]), (there, &["tcp"])] {
        let hello = v1::SenderHello {
            oldest_protocol: 1,
            newest_protocol: 1,
            instance_id: "prefill-9".into(),
            incarnation: 1,
            layout: Some((&form.layout()).into()),
            nonce: vec![1; 16].into(),
        };
        let hello = v1::sender_message::Body::Hello(hello);
        let sender = ScriptedSender::open_with(&decode, hello).await.expect("welcome");
        assert_eq!(sender.told, told);
    }
    // A sender does not take them, though it is told.
    for (form, tried) in [(here, true), (there, false)] {
        let prefill = Peer::start_with("prefill-0", setup());
        let mut receiver = ScriptedReceiver::start().await;
        receiver.also = ["rdma", "hixl", "hccl"].map(|kind| (kind, "127.0.0.1:1".into())).into();
        let mut spec = offer_spec(TransferId::generate(), &decode, &[1]);
        (spec.peer, spec.receiver) = (receiver.address.to_string(), instance("decode-9"));
        let _outgoing = prefill.node.offer(spec).expect("room");
        let _stream = receiver.stream_with("decode-9", 1, &form.layout()).await;
        let tries = |kind: &str| {
            let by_transport = prefill.node.stats().by_transport;
            let of_kind = by_transport.iter().filter(|one| one.kind.name() == kind);
            of_kind.map(|one| one.opened + one.failed).sum::<u64>()
        };
        until("it has a path or not", || tries(if tried { "hixl" } else { "tcp" }) > 0).await;
        assert_eq!(tries("hixl") > 0, tried);
    }
}
