-- toolfleet: the state functions of jobs.
--
-- The files of this folder are joined in the order of their names into one Redis FUNCTION library; Python fills in
-- the two names in braces, which carry a hash of the text, so that two versions of toolfleet can run side by side.
--
-- Every function takes ONE key, the root of a partition, `tf:{<pp>}`. All keys it touches begin with it, so its hash
-- tag puts them into one slot of a Redis Cluster:
--   <root>:job:<id>            hash    the record
--   <root>:log:<id>            stream  the event log, an entry a write; its id is `n-0` where n is its last event
--   <root>:res:<id>            hash    tool_call_id -> 'c' (completed) or 'f' (failed), then the result's JSON
--   <root>:ix:<tier>:<status>  zset    job ids by creation time
--   <root>:due                 zset    job ids by the time at which the reconciler is to look at them
--   <root>:expiry              zset    `<tier>:<status>:<id>` by the time at which the record is gone
--   <root>:letter:<id>         string  fence of the newest dead letter that was redriven, for as long as letters are kept
--   <root>:gone                zset    ids of jobs that expired, the latest ones, for a while
--   <root>:totals              hash    jobs that ended, by status
--   <root>:rate:<minute>       string  jobs that ended in a minute
-- and the channels <root>:ev:<id> (events) and tf:ctl:<worker> (cancel requests).
--
-- Fields of a record: v status generation fence token lease_until starts retries task tier tenant hash created
-- started finished not_before ran run_from timeout expires total done failed seq cancel worker error stage percent
-- message tool log_max ttl ended_by wseq stale, and per call  m:<id> = fence of its start (calls that must not run twice),
-- u:<id> = outcome not known and not decided,  d:<id> = decision as JSON.

local TERMINAL = { completed = true, failed = true, cancelled = true, unknown = true }

-- After this long past its due time or its lease a job is looked at by the reconciler: longer than a redelivery needs.
local GRACE_MS = 10000

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- Numbers go to commands and into strings as they are: Lua writes whole ones below 10^14 without an exponent, and
-- milliseconds reach that in the year 5138.

local function keys_of(root, id)
  return { root = root, id = id, job = root .. ':job:' .. id, log = root .. ':log:' .. id,
           res = root .. ':res:' .. id, events = root .. ':ev:' .. id, due = root .. ':due' }
end

-- What every transition reads, and what a claim reads besides.
local FIELDS = { 'status', 'generation', 'fence', 'tier', 'created', 'seq', 'log_max', 'ttl', 'ran', 'run_from',
                 'lease_until', 'done', 'failed', 'total', 'cancel', 'ended_by', 'wseq', 'worker' }
local CLAIM_FIELDS = { 'status', 'generation', 'fence', 'tier', 'created', 'seq', 'log_max', 'ttl', 'ran', 'run_from',
                       'lease_until', 'done', 'failed', 'total', 'cancel', 'ended_by', 'wseq', 'worker', 'token',
                       'starts', 'retries', 'not_before', 'timeout', 'expires', 'started', 'stale', 'hash' }
local TEXT = { status = true, token = true, tier = true, cancel = true, worker = true, hash = true }

-- The record as a table, or nil. Absent numbers read as 0.
local function load_record(k, fields)
  local values = redis.call('HMGET', k.job, unpack(fields))
  if not values[1] then return nil end
  local rec = { told = {} }
  for i = 1, #fields do
    local name, value = fields[i], values[i]
    if TEXT[name] then rec[name] = value else rec[name] = value and tonumber(value) or 0 end
  end
  return rec
end

-- Note an event; `tell` appends it. The caller writes rec.seq back with the rest of the record.
local function emit(_, rec, now, kind, data)
  rec.seq = rec.seq + 1
  local told = rec.told
  told[#told + 1] = rec.seq .. '\n' .. kind .. '\n' .. rec.fence .. '\n' .. rec.generation .. '\n' .. now .. '\n' .. data
end

-- Append what was noted to the log and push it to readers: one entry and one message for all events of a write, which
-- more than halves what the log costs. The entry's id is the last event's; JSON has no raw control characters, so the
-- record separator can't occur in the data.
local function tell(k, rec)
  if #rec.told == 0 then return end
  local events = table.concat(rec.told, '\030')
  redis.call('XADD', k.log, 'MAXLEN', rec.log_max, rec.seq .. '-0', 'e', events)
  redis.call('PUBLISH', k.events, events)
  rec.told = {}
end

local function index(k, tier, status)
  return k.root .. ':ix:' .. tier .. ':' .. status
end

local function move(k, rec, status)
  if rec.status == status then return end
  redis.call('ZREM', index(k, rec.tier, rec.status), k.id)
  redis.call('ZADD', index(k, rec.tier, status), rec.created, k.id)
  rec.status = status
end

-- The running time of an attempt that ends at `now`, added up; a dead one ran to the end of its lease at most.
local function stop_clock(rec, now)
  if rec.run_from == 0 then return rec.ran end
  local stop = now
  if rec.lease_until > 0 and rec.lease_until < now then stop = rec.lease_until end
  return rec.ran + math.max(0, stop - rec.run_from)
end

-- One terminal transition: record, index, counters, event, expiry, all at once.
local function finish_record(k, rec, now, status, kind, data, error)
  local ran = stop_clock(rec, now)
  move(k, rec, status)
  emit(k, rec, now, kind, data)
  redis.call('HSET', k.job, 'status', status, 'seq', rec.seq, 'finished', now, 'ran', ran, 'run_from', 0,
             'ended_by', rec.fence, 'error', error, 'done', rec.done, 'failed', rec.failed)
  redis.call('ZREM', k.due, k.id)
  redis.call('HINCRBY', k.root .. ':totals', status, 1)
  local rate = k.root .. ':rate:' .. (math.floor(now / 60000))
  if redis.call('INCR', rate) == 1 then redis.call('EXPIRE', rate, 1200) end
  redis.call('ZADD', k.root .. ':expiry', now + rec.ttl, rec.tier .. ':' .. status .. ':' .. k.id)
  tell(k, rec)
  redis.call('PEXPIRE', k.job, rec.ttl)
  redis.call('PEXPIRE', k.log, rec.ttl)
  redis.call('PEXPIRE', k.res, rec.ttl)
end

-- A job that waits: for its first attempt, or for the next one.
local function wait_again(k, rec, now, not_before, ran)
  tell(k, rec)
  move(k, rec, 'queued')
  redis.call('HSET', k.job, 'status', 'queued', 'not_before', not_before, 'ran', ran, 'lease_until', '0',
             'run_from', '0', 'token', '', 'worker', '', 'tool', '', 'seq', rec.seq, 'starts', rec.starts,
             'retries', rec.retries, 'ended_by', '0', 'done', rec.done, 'failed', rec.failed)
  redis.call('ZADD', k.due, math.max(now, not_before) + GRACE_MS, k.id)
end

-- The calls of a job: those with a result ('c' or 'f'), and those that were started, must not run twice and have none.
local function calls_of(k)
  local done, marked, results = {}, {}, redis.call('HGETALL', k.res)
  for i = 1, #results, 2 do done[results[i]] = string.sub(results[i + 1], 1, 1) end
  for _, field in ipairs(redis.call('HKEYS', k.job)) do
    if string.sub(field, 1, 2) == 'm:' then
      local call = string.sub(field, 3)
      if not done[call] then marked[#marked + 1] = call end
    end
  end
  return done, marked
end

local function count(map)
  local n = 0
  for _ in pairs(map) do n = n + 1 end
  return n
end

-- Results that say 'failed' go, with the marks of their calls: a new generation runs the calls that did not succeed.
local function drop_failed(k, rec)
  local done = calls_of(k)
  for call, outcome in pairs(done) do
    if outcome == 'f' then
      redis.call('HDEL', k.res, call)
      redis.call('HDEL', k.job, 'm:' .. call)
    end
  end
  rec.done, rec.failed = redis.call('HLEN', k.res), 0
end

-- A new generation with the same id, log and results: starts 0, nothing requested, nothing undecided. What bounded the
-- start of the first one does not bound a later one.
local function open_generation(k, rec, generation)
  for _, status in ipairs({ 'failed', 'cancelled', 'unknown' }) do
    redis.call('ZREM', k.root .. ':expiry', rec.tier .. ':' .. status .. ':' .. k.id)
  end
  for _, field in ipairs(redis.call('HKEYS', k.job)) do
    local kind = string.sub(field, 1, 2)
    if kind == 'u:' or kind == 'd:' then redis.call('HDEL', k.job, field) end
  end
  rec.generation, rec.starts, rec.retries, rec.cancel, rec.ran = generation, 0, 0, nil, 0
  rec.run_from, rec.not_before, rec.expires, rec.stale = 0, 0, 0, 0
  redis.call('HDEL', k.job, 'cancel', 'finished', 'error', 'stage', 'message', 'stale')
  redis.call('HSET', k.job, 'generation', generation, 'percent', '0', 'expires', '0', 'retries', '0')
  redis.call('PERSIST', k.job); redis.call('PERSIST', k.log); redis.call('PERSIST', k.res)
end

-- Sorted, so that replies and replicas do not depend on the order of a Lua table.
local function json_list(names)
  table.sort(names)
  local quoted = {}
  for i, name in ipairs(names) do quoted[i] = cjson.encode(name) end
  return '[' .. table.concat(quoted, ',') .. ']'
end

-- Why somebody else than the job's own attempt ends it, where the error does not tell.
local function because(reason)
  return reason and ',"reason":"' .. reason .. '"' or ''
end

-- What persons have decided since the job became unknown, as JSON for the event that tells it.
local function decisions_of(k)
  local names, found = {}, {}
  for _, field in ipairs(redis.call('HKEYS', k.job)) do
    if string.sub(field, 1, 2) == 'd:' then names[#names + 1] = field end
  end
  table.sort(names)
  for i, field in ipairs(names) do found[i] = redis.call('HGET', k.job, field) end
  return '[' .. table.concat(found, ',') .. ']', names
end

local function end_unknown(k, rec, now, marked, reason)
  for _, call in ipairs(marked) do redis.call('HSET', k.job, 'u:' .. call, '1') end
  local text = '{"code":"outcome_unknown","message":"a call that must not run twice was started and its outcome is ' ..
               'not known; decide it with POST /api/v1/jobs/' .. k.id .. '/resolve"}'
  finish_record(k, rec, now, 'unknown', 'job.unknown',
                '{"status":"unknown","calls":' .. json_list(marked) .. ',"error":' .. text .. because(reason) .. '}', text)
end

-- The end of a cancel that no attempt tells of; `data` is a JSON object. Nobody was told anything, so a call may still
-- run that was started without a result, and any that a dead worker (the job is running) may have sent. `left` is the
-- state of the open calls where the attempt itself has just ended; the states are `CallStop`'s. Answers the event's data.
local function end_cancelled(k, rec, now, data, left)
  local died = rec.status == 'running' and not left
  local open = left or (died and 'not_told' or 'not_sent')
  local done, marked = calls_of(k)
  local started, calls, still = {}, {}, {}
  for _, call in ipairs(marked) do started[call] = true end
  local read, task = pcall(cjson.decode, redis.call('HGET', k.job, 'task') or '{}')
  for _, call in ipairs(read and task.tools or {}) do
    local id = call.tool_call_id
    local state = done[id] and 'ended' or (started[id] and 'not_told' or open)
    if state == 'not_told' or state == 'told' then still[#still + 1] = id end
    calls[#calls + 1] = '{"tool_call_id":' .. cjson.encode(id) .. ',"tool_name":' .. cjson.encode(call.tool_name) ..
                        ',"state":"' .. state .. '"}'
  end
  data = string.sub(data, 1, -2) .. ',"reached":"' .. (left and 'worker' or (died and 'requested' or 'queued')) ..
         '","tool_stopped":"' .. (#still > 0 and 'not_confirmed' or 'nothing_was_running') .. '","still_running":' ..
         json_list(still) .. ',"calls":[' .. table.concat(calls, ',') .. ']}'
  finish_record(k, rec, now, 'cancelled', 'job.cancelled', data, '')
  return data
end

local function end_failed(k, rec, now, code, message, reason)
  local text = cjson.encode({ code = code, message = message })
  finish_record(k, rec, now, 'failed', 'job.failed', '{"status":"failed","error":' .. text .. because(reason) .. '}',
                text)
end

-- Where a record is made: the fields of a task, from ARGV[i] on, in the order of `birth_args` in Python.
local BIRTH = 12
local function birth_of(args, i)
  return { generation = args[i], tier = args[i + 1], tenant = args[i + 2], hash = args[i + 3], total = args[i + 4],
           timeout = args[i + 5], expires = args[i + 6], delay = tonumber(args[i + 7]), run_at = tonumber(args[i + 8]),
           log_max = args[i + 9], ttl = args[i + 10], task = args[i + 11] }
end

-- `since` is when the job was submitted: now, or the time at which the stream stored its message. A record that is made
-- again from a dead letter goes on from the letter's fence, and `data` is what its first event tells.
local function make_record(k, birth, now, since, fence, data)
  fence = fence or 0
  local not_before = math.max(birth.run_at, birth.delay > 0 and since + birth.delay or 0)
  -- Where Redis has lost the record alone, what is left of its log would refuse the ids of the new one.
  redis.call('DEL', k.log, k.res)
  redis.call('HSET', k.job, 'v', '1', 'status', 'queued', 'generation', birth.generation, 'fence', fence,
             'tier', birth.tier, 'tenant', birth.tenant, 'hash', birth.hash, 'total', birth.total,
             'timeout', birth.timeout, 'expires', birth.expires, 'log_max', birth.log_max, 'ttl', birth.ttl,
             'task', birth.task, 'created', since, 'not_before', not_before, 'seq', '1')
  redis.call('ZADD', index(k, birth.tier, 'queued'), since, k.id)
  redis.call('ZADD', k.due, math.max(now, not_before) + GRACE_MS, k.id)
  local rec = { status = 'queued', generation = tonumber(birth.generation), fence = fence, lease_until = 0, starts = 0,
                retries = 0, tier = birth.tier, created = since, not_before = not_before, ran = 0, run_from = 0,
                timeout = tonumber(birth.timeout), expires = tonumber(birth.expires), total = tonumber(birth.total),
                done = 0, failed = 0, seq = 0, log_max = birth.log_max, ttl = tonumber(birth.ttl), ended_by = 0,
                wseq = 0, started = 0, stale = 0, told = {} }
  if not data then
    data = '{"tier":"' .. birth.tier .. '","total_tools":' .. birth.total
    if not_before > now then data = data .. ',"next_attempt_at_ms":' .. not_before end
    data = data .. '}'
  end
  emit(k, rec, now, 'job.queued', data)
  tell(k, rec)
  return rec
end

-- Results `(call, payload)*` and events `(type, data)*` from ARGV[i] on; each list is preceded by its length.
-- A result is stored once in a generation, so repeating a write whose answer was lost changes nothing.
local function apply_changes(k, rec, now, args, i)
  local results = tonumber(args[i])
  i = i + 1
  for _ = 1, results do
    if redis.call('HSETNX', k.res, args[i], args[i + 1]) == 1 then
      if string.sub(args[i + 1], 1, 1) == 'c' then rec.done = rec.done + 1 else rec.failed = rec.failed + 1 end
    end
    i = i + 2
  end
  local events = tonumber(args[i])
  i = i + 1
  for _ = 1, events do
    emit(k, rec, now, args[i], args[i + 1])
    i = i + 2
  end
  return i
end
