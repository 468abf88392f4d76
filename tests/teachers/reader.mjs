// Reads a store of teacher signals. It was written from docs/store_format.md and what that
// page refers to, and shows that they are enough to write a reader in another language.
//
//     node reader.mjs STORE_DIR
//
// prints what the store says as JSON: each unit, in the order of the keys, and the head. An
// array is {dtype, shape, data}: data is base64 of little-endian numbers in C order.
// Whatever is wrong with a file is an error that names the file, and status 1.
// Only modules that Node brings are used, and zstd.mjs where it has no Zstandard: before 22.15.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import zlib from "node:zlib";

import { Bytes, bit, must } from "./bytes.mjs";
import { zstd } from "./zstd.mjs";

const SIZES = {
  bool: 1, int8: 1, uint8: 1, int16: 2, uint16: 2, float16: 2, bfloat16: 2,
  int32: 4, uint32: 4, float32: 4, int64: 8, uint64: 8, float64: 8,
};
const product = (shape) => shape.reduce((a, b) => a * b, 1);

function sizeOf(dtype) {
  must(Object.hasOwn(SIZES, dtype), `have a dtype that is known, got ${dtype}`);
  return SIZES[dtype];
}

function fromBfloat16(half) {
  const whole = Buffer.alloc(4);
  whole.writeUInt16LE(half, 2);
  return whole.readFloatLE();
}

function fromFloat16(half) {
  const [sign, exponent, part] = [half >> 15 ? -1 : 1, (half >> 10) & 31, half & 1023];
  if (exponent === 31) return part ? NaN : sign * Infinity;
  return sign * (exponent ? (1024 + part) * 2 ** (exponent - 25) : part * 2 ** -24);
}

/** Numbers as float32, which has those of two bytes exactly. */
function floats(bytes, dtype) {
  const size = sizeOf(dtype);
  const from = dtype === "bfloat16" ? fromBfloat16 : fromFloat16;
  return Float32Array.from({ length: bytes.length / size }, (_, i) =>
    size === 4 ? bytes.readFloatLE(4 * i) : from(bytes.readUInt16LE(2 * i)));
}

function asArray(numbers, dtype, shape) {
  const bytes = Buffer.alloc(numbers.length * 4);
  numbers.forEach((n, i) =>
    dtype === "int32" ? bytes.writeInt32LE(n, 4 * i) : bytes.writeFloatLE(n, 4 * i));
  return { dtype, shape, data: bytes.toString("base64") };
}

function rawArray(bytes, spec, ...positions) {
  const shape = [...positions, ...spec.shape];
  const data = bytes.take(product(shape) * sizeOf(spec.dtype)).toString("base64");
  return { dtype: spec.dtype, shape, data };
}

// --- the manifest -----------------------------------------------------------------------

// A token of JSON that is a string, or one that is a number or a word.
const SCALAR = /"(?:[^"\\]|\\.)*"|[^\s{}[\],:"]+/g;
const byCodePoints = (a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b));

function ascii(string) {
  const escaped = (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0");
  return JSON.stringify(string).replace(/[^ -~]/g, escaped);
}

/** The text that the digest is of. Numbers are strings here, that begin with a NUL. */
function canonical(value) {
  if (typeof value === "string") return value[0] === "\0" ? value.slice(1) : ascii(value);
  if (Array.isArray(value)) return `[${value.map(canonical).join(", ")}]`;
  const names = Object.keys(value).sort(byCodePoints);
  return `{${names.map((name) => `${ascii(name)}: ${canonical(value[name])}`).join(", ")}}`;
}

const sha256 = (data) => createHash("sha256").update(data).digest("hex");

function readManifest(text) {
  const known = text.replace(SCALAR, (s) => (/^-?(NaN|Infinity)$/.test(s) ? "null" : s));
  const manifest = JSON.parse(known);
  must(manifest.format === 1, `be of format 1, got ${manifest.format}`);
  // Numbers stay the text that they are in the file: 1.0 is not 1.
  const tagged = text.replace(SCALAR, (s) => (s[0] === '"' ? s : JSON.stringify("\0" + s)));
  const { digest, ...others } = JSON.parse(tagged);
  must(sha256(canonical(others)) === digest, "have the digest that it carries");
  return manifest;
}

// --- files of records -------------------------------------------------------------------

function checked(content, { bytes, sha256: expected }) {
  must(content.length === bytes, `have ${bytes} bytes, got ${content.length}`);
  must(sha256(content) === expected, "have the SHA-256 of the manifest");
  return content;
}

function decompress(type, data) {
  if (type === 0) return data;
  must(type === 0x7a, `have chunks of Zstandard or uncompressed ones, got type ${type}`);
  const bytes = new Bytes(data);
  const size = bytes.varint();
  const found = (zlib.zstdDecompressSync ?? zstd)(bytes.rest());
  must(found.length === size, "decompress to the size that it carries");
  return found;
}

/** The records of a Riegeli file, one by one: the reader stops when it has its own. */
function* recordsOf(content) {
  const parts = [];
  for (let block = 0; block < content.length; block += 65536)
    parts.push(content.subarray(block + 24, block + 65536)); // without block headers
  const file = new Bytes(Buffer.concat(parts));
  while (file.at < file.buffer.length) {
    const begin = file.at;
    file.take(8); // hashes are not looked at: the SHA-256 of the file is
    const size = file.uint64();
    file.take(8);
    const type = String.fromCharCode(file.uint8());
    const count = file.take(7).readUIntLE(0, 6);
    file.take(8);
    const chunk = new Bytes(file.take(size));
    must("smpr".includes(type), `have simple chunks alone, got one of type ${type}`);
    if (type === "r") {
      const compression = chunk.uint8();
      const sizes = new Bytes(decompress(compression, chunk.take(chunk.varint())));
      const values = new Bytes(decompress(compression, chunk.rest()));
      for (let i = 0; i < count; i++) yield values.take(sizes.varint());
      values.end();
    }
    file.at = Math.max(file.at, begin + count); // padding
  }
}

function readShard(content, { rows, units, positions }) {
  const records = recordsOf(content);
  const next = () => {
    const { value, done } = records.next();
    must(!done, `have an index and a record for each of ${rows} rows`);
    return new Bytes(value);
  };
  const index = next();
  must(index.take(4).toString("latin1") === "DJXS", "begin with DJXS");
  must(index.uint32() === rows, `have ${rows} rows`);
  const counts = Array.from({ length: rows }, () => index.uint32());
  const keys = counts.map((count) => Array.from({ length: count }, () => index.uint64()));
  index.end();
  const found = [];
  for (const expected of keys) {
    const row = next();
    must(row.uint32() === expected.length, "have the units of a row that the index says");
    const heads = expected.map((key) => {
      must(row.uint64() === key, "have the keys of a row that the index says");
      return { key, check: row.uint32(), positions: row.uint32(), size: row.uint32() };
    });
    for (const { size, ...unit } of heads) found.push({ ...unit, kept: row.take(size) });
    row.end();
  }
  must(found.length === units, `have ${units} units`);
  const sum = found.reduce((total, unit) => total + unit.positions, 0);
  must(sum === positions, `have ${positions} positions`);
  return found;
}

// --- what is kept of a unit -------------------------------------------------------------

function decodeUnit({ kept, ...unit }, signal) {
  const bytes = new Bytes(kept);
  const features = {};
  for (const name of Object.keys(signal.features).sort(byCodePoints)) {
    const spec = signal.features[name];
    features[name] = rawArray(bytes, spec, ...(spec.per_position ? [unit.positions] : []));
  }
  const arrays = signal.logits ? decodeLogits(bytes, unit.positions, signal.logits) : {};
  bytes.end();
  return { ...unit, arrays, features };
}

function decodeLogits(bytes, positions, logits) {
  const { kind, options, arrays } = logits;
  if (kind === "sampled") return decodeSampled(bytes, positions, logits);
  if (kind === "top_k") return decodeTopK(bytes, positions, logits);
  if (kind === "dense") return { logits: rawArray(bytes, arrays.logits, positions) };
  must(kind === "hidden", `be of a kind that is known, got ${kind}`);
  if (options.dtype === "same") return { hidden: rawArray(bytes, arrays.hidden, positions) };
  must(options.dtype === "int8", `be of a dtype that is known, got ${options.dtype}`);
  const width = product(arrays.hidden.shape);
  const codes = bytes.take(positions * width);
  const scales = floats(bytes.take(4 * positions), "float32");
  const states = Float32Array.from(codes, (_, i) =>
    codes.readInt8(i) * scales[Math.floor(i / width)]);
  return { hidden: asArray(states, "float32", [positions, width]) };
}

/** The sets (Elias-Fano) at the end of a record: `sizes` are those of the positions. */
function decodeSets(bytes, sizes, numClasses) {
  const total = sizes.reduce((a, b) => a + b, 0);
  const width = bytes.uint8();
  must(width <= 24, `have w of at most 24, got ${width}`);
  const low = bytes.take(Math.ceil((total * width) / 8));
  const high = bytes.rest();
  must(total ? high[high.length - 1] : !high.length, "have no bytes behind the last one bit");
  let at = 0;
  let number = 0;
  const sets = sizes.map((size) => {
    const ids = [];
    for (let h = 0; ids.length < size; number++) {
      for (; !bit(high, at); at++, h++)
        must(at < 8 * high.length, "have as many one bits as ids");
      at++;
      let id = h * 2 ** width;
      for (let j = 0; j < width; j++) id += bit(low, number * width + j) * 2 ** j;
      must(!ids.length || ids[ids.length - 1] < id, "have ids that rise at each position");
      must(id < numClasses, `have ids below ${numClasses}`);
      ids.push(id);
    }
    return ids;
  });
  for (; at < 8 * high.length; at++) must(!bit(high, at), "have as many one bits as ids");
  return sets;
}

/** The different ids of each position and how often each was drawn, filled up with 0. */
function decodeSampled(bytes, positions, { options, num_classes, max_distinct }) {
  const draws = options.num_samples;
  const steps = bytes.take(Math.ceil((positions * (draws - 1)) / 8));
  const counts = Array.from({ length: positions }, (_, t) => {
    const found = [1];
    for (let i = 0; i < draws - 1; i++) {
      if (bit(steps, t * (draws - 1) + i)) found.push(1);
      else found[found.length - 1]++;
    }
    return found;
  });
  for (let i = positions * (draws - 1); i < 8 * steps.length; i++)
    must(!bit(steps, i), "have no ones in the padding behind the steps");
  const sets = decodeSets(bytes, counts.map((found) => found.length), num_classes);
  const most = counts.reduce((n, found) => Math.max(n, found.length), 1);
  must(most <= max_distinct, `have at most ${max_distinct} different ids at a position`);
  const filled = (lists) =>
    lists.flatMap((list) => [...list, ...Array(max_distinct - list.length).fill(0)]);
  const shape = [positions, max_distinct];
  return {
    ids: asArray(filled(sets), "int32", shape),
    counts: asArray(filled(counts), "int32", shape),
  };
}

function log8(bytes, k) {
  const b = bytes.uint8();
  const range = (16 + (b % 16)) * 2 ** (Math.floor(b / 16) - 6);
  const even = Math.min(range, 8);
  const [first, second] = [Math.fround(even / 254), Math.fround((range - even) / 254 ** 2)];
  return Array.from(bytes.take(k), (c) => {
    if (c === 255) return -Infinity;
    return -Math.fround(c * Math.fround(first + Math.fround(c * second)));
  });
}

function decodeTopK(bytes, positions, { options, num_classes }) {
  const { k, temperatures, values } = options;
  must(["log8", "bfloat16", "float32"].includes(values), `be a coding, got ${values}`);
  const tailType = values === "float32" ? "float32" : "float16";
  const one = temperatures.indexOf(1);
  const logProbs = [];
  const logTail = [];
  for (let t = 0; t < positions; t++) {
    const coded = (dtype, count) => floats(bytes.take(sizeOf(dtype) * count), dtype);
    let probs = values === "log8" ? log8(bytes, k) : coded(values, k);
    let tails = coded(tailType, temperatures.length);
    must(!tails.some((x) => Number.isNaN(x) || x === Infinity), "have tails below +inf");
    const tail = one < 0 ? 1 : Math.exp(tails[one]); // unknown without 1 in the grid
    const total = probs.reduce((sum, x) => sum + Math.exp(x), tail);
    must(total > 0 && total < Infinity, `have a total that is a number, got ${total}`);
    if (values !== "float32" && one >= 0) {
      probs = probs.map((x) => x - Math.log(total));
      tails = tails.map((x, g) => x - Math.log(total) / temperatures[g]);
    }
    logProbs.push(...probs);
    logTail.push(...tails);
  }
  const ids = decodeSets(bytes, Array(positions).fill(k), num_classes).flat();
  return {
    ids: asArray(ids, "int32", [positions, k]),
    log_probs: asArray(logProbs, "float32", [positions, k]),
    log_tail: asArray(logTail, "float32", [positions, temperatures.length]),
  };
}

// --- the store --------------------------------------------------------------------------

function readStore(folder) {
  const named = (file, read) => {
    try {
      return read(readFileSync(join(folder, file)));
    } catch (error) {
      throw new Error(`${file}: ${error.message}`);
    }
  };
  const manifest = named("manifest.json", (content) => readManifest(content.toString("utf8")));
  const head = manifest.head && named("head.bin", (content) => {
    checked(content, manifest.head);
    return Object.fromEntries(manifest.head.arrays.map((array) =>
      [array.name, rawArray(new Bytes(content.subarray(array.offset)), array)]));
  });
  const units = manifest.shards.flatMap((shard) => named(shard.file, (content) =>
    readShard(checked(content, shard), shard).map((unit) => decodeUnit(unit, manifest.signal))));
  units.sort((a, b) => a.key - b.key);
  must(units.length === manifest.data.num_units && units.every((unit, i) => unit.key === i),
    "have each unit of the data once in the shards");
  return { units, head, numbers: manifest.head && manifest.head.numbers };
}

try {
  process.stdout.write(JSON.stringify(readStore(process.argv[2])));
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
}
