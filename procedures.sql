-- procedures.sql: the tables and stored procedures that config.xml calls.
--
-- For Microsoft SQL Server 2012 and later (database compatibility level 110 and later).
--
-- HOW TO RUN IT
--   SQL Server Management Studio: choose the SIS database in the toolbar's list, open this file,
--   press Execute. Or, from a command prompt:
--     sqlcmd -S SERVER -d DATABASE -E -b -i procedures.sql
--   Run it again whenever it changes. A second run changes no data and loses no permission: tables
--   that exist are left alone, and procedures are altered, never dropped.
--
-- WHAT IT MAKES
--   in the schema samegoal   in the schema dbo
--   Student                  (nothing: the district's students are only read)
--   IEP                      sg_iep_upsert, sg_iep_delete
--   ServicesPlan             sg_services_plan_upsert, sg_services_plan_delete
--   EvaluationTeamReport     sg_evaluation_team_report_upsert, sg_evaluation_team_report_delete
--   SpecialEdDate            sg_special_ed_date_upsert, sg_special_ed_date_delete
--   ProgramFlag              sg_program_flag_upsert, sg_program_flag_delete, sg_cleanup
--   Nothing outside the schema samegoal and the names dbo.sg_* is made or changed.
--
-- RULES THAT EVERY PROCEDURE KEEPS
--   * Parameters have the names and the order of the columns of the CSV file. Every value is text
--     or NULL: dates YYYY-MM-DD, bits 0 or 1. The procedure converts and checks it, so that a bad
--     value is refused with the row's key; nothing is ever cut short to fit.
--   * A call for a row that already matches changes nothing, not even modifiedDate. So a run that
--     broke off may simply be run again.
--   * Text is compared exactly (Latin1_General_BIN2), as the nightly comparison does it. Under the
--     usual case-insensitive collation "Ab" would count as equal to "AB" here and as different
--     there, and the row would come back every night.
--   * A completed document is a locked one. The query in config.xml shows whether it is locked, so
--     one that staff unlocked is seen as a difference, and the upsert locks it again.
--   * Nothing is deleted from a table: special education records must be kept. A row that SameGoal
--     no longer has gets a retiredDate, a program flag its endDate too; the queries in config.xml
--     leave retired rows out, and so must the district's reports. When SameGoal sends the row
--     again, the upsert brings it back.
--   * The transaction is the caller's: no procedure begins, commits or rolls back. XACT_ABORT is
--     off inside them, because with it on one bad row would roll back its whole batch on the
--     server, and the rows behind it would run, and stay, outside any transaction.
--   * Errors are thrown with number 50001 and name the record, the student number and the key; no
--     student's name occurs in any table, parameter or message. Deadlocks (1205), lock time-outs
--     (1222) and whatever dooms the transaction are thrown on unchanged, so that the caller can
--     try again.

-- sqlcmd turns QUOTED_IDENTIFIER off, and procedures keep the setting they were made under.
SET ANSI_NULLS ON;
SET QUOTED_IDENTIFIER ON;
SET NOCOUNT ON;
GO

-- NOEXEC makes the server skip all that follows, up to the last line of this file.
IF DB_ID() <= 4
BEGIN
    RAISERROR (N'This is a system database: choose the database of the SIS first.', 16, 1);
    SET NOEXEC ON;
END;
GO

IF (SELECT compatibility_level FROM sys.databases WHERE database_id = DB_ID()) < 110
BEGIN
    RAISERROR (N'This database has a compatibility level below 110 (SQL Server 2012).', 16, 1);
    SET NOEXEC ON;
END;
GO

----------------------------------------------------------------------------------------------------
-- 1. The schema
----------------------------------------------------------------------------------------------------

-- Owned by dbo like the procedures: whoever may execute a procedure needs no right on the tables.
IF SCHEMA_ID(N'samegoal') IS NULL
    EXEC (N'CREATE SCHEMA samegoal AUTHORIZATION dbo;');
GO

----------------------------------------------------------------------------------------------------
-- 2. The district's own tables
--
-- On an empty database leave this section as it is: section 3 makes every table, and after
--     INSERT INTO samegoal.Student (studentNumber, stateID) VALUES (N'100001', N'AB1234567');
-- the whole integration can be tried. For real use give the names of section 3 to the district's
-- own tables here; whatever is named here is not created below. A name can be
--   * a synonym, where the columns have the names and types that section 3 shows:
--         CREATE SYNONYM samegoal.ProgramFlag FOR OtherDatabase.dbo.SpecialEdFlag;
--   * a view, where they have other names; with INSTEAD OF triggers, where one row is kept in more
--     than one table.
-- A table that an earlier run made must be dropped before its name can be given to something else.
-- Mind that
--   * a table that also holds rows which SameGoal did not make must be seen through a view that
--     leaves them out, or all of them would be retired on the first night. (The limits in
--     config.xml hold such a run back: do not force it.)
--   * retiredDate, and endedByExit of ProgramFlag, need a place. Where the SIS has none, keep them
--     in a table of your own, join it in the view, and write both in the INSTEAD OF triggers.
--   * the table needs a unique index on the columns of the UNIQUE constraint in section 3: it keeps
--     two sessions from inserting one record twice.
-- A column that is missing makes an ALTER PROCEDURE below fail, and its message names the column.
--
-- Infinite Campus keeps students in dbo.Person and their enrollments in dbo.Enrollment. This view
-- is enough for reading them; remove the leading dashes to use it. A student left on the last day
-- of the last enrollment, if no enrollment is without an end.
--
-- IF OBJECT_ID(N'samegoal.Student') IS NULL
--     EXEC (N'CREATE VIEW samegoal.Student AS SELECT 1 AS personID;');
-- GO
-- ALTER VIEW samegoal.Student
-- AS
-- SELECT
--     p.personID,
--     p.studentNumber,
--     p.stateID,
--     (
--         SELECT CAST(MAX(e.endDate) AS date)
--         FROM dbo.Enrollment AS e
--         WHERE e.personID = p.personID
--             AND NOT EXISTS (
--                 SELECT 1
--                 FROM dbo.Enrollment AS o
--                 WHERE o.personID = p.personID AND o.endDate IS NULL
--             )
--     ) AS exitDate
-- FROM dbo.Person AS p
-- WHERE p.studentNumber IS NOT NULL;
-- GO
----------------------------------------------------------------------------------------------------

----------------------------------------------------------------------------------------------------
-- 3. Tables, made only where section 2 (or an earlier run) has not named something else
--
-- There are no foreign keys, because samegoal.Student may be a view or a synonym.
----------------------------------------------------------------------------------------------------

IF OBJECT_ID(N'samegoal.Student') IS NULL
    CREATE TABLE samegoal.Student (
        personID int IDENTITY (1, 1) NOT NULL CONSTRAINT PK_samegoal_Student PRIMARY KEY,
        -- SameGoal's limit for a student number is 20 characters.
        studentNumber nvarchar(20) COLLATE Latin1_General_BIN2 NOT NULL
            CONSTRAINT UQ_samegoal_Student UNIQUE,
        -- The student's number in state reporting.
        stateID nvarchar(20) NULL,
        -- The day on which the student left the district; NULL: has not left.
        exitDate date NULL
    );
GO

IF OBJECT_ID(N'samegoal.IEP') IS NULL
    CREATE TABLE samegoal.IEP (
        iepID int IDENTITY (1, 1) NOT NULL CONSTRAINT PK_samegoal_IEP PRIMARY KEY NONCLUSTERED,
        personID int NOT NULL,
        startDate date NOT NULL,
        endDate date NULL,
        meetingDate date NULL,
        meetingType nvarchar(20) NULL,
        primaryDisability nvarchar(50) NULL,
        placement nvarchar(50) NULL,
        extendedSchoolYear bit NULL,
        specialTransportation bit NULL,
        alternateAssessment bit NULL,
        locked bit NOT NULL,
        retiredDate date NULL,
        modifiedDate datetime2(0) NOT NULL,
        CONSTRAINT UQ_samegoal_IEP UNIQUE CLUSTERED (personID, startDate),
        CONSTRAINT CK_samegoal_IEP_dates CHECK (endDate >= startDate)
    );
GO

IF OBJECT_ID(N'samegoal.ServicesPlan') IS NULL
    CREATE TABLE samegoal.ServicesPlan (
        servicesPlanID int IDENTITY (1, 1) NOT NULL
            CONSTRAINT PK_samegoal_ServicesPlan PRIMARY KEY NONCLUSTERED,
        personID int NOT NULL,
        startDate date NOT NULL,
        endDate date NULL,
        meetingDate date NULL,
        primaryDisability nvarchar(50) NULL,
        servingSchool nvarchar(100) NULL,
        specialTransportation bit NULL,
        locked bit NOT NULL,
        retiredDate date NULL,
        modifiedDate datetime2(0) NOT NULL,
        CONSTRAINT UQ_samegoal_ServicesPlan UNIQUE CLUSTERED (personID, startDate),
        CONSTRAINT CK_samegoal_ServicesPlan_dates CHECK (endDate >= startDate)
    );
GO

IF OBJECT_ID(N'samegoal.EvaluationTeamReport') IS NULL
    CREATE TABLE samegoal.EvaluationTeamReport (
        evaluationTeamReportID int IDENTITY (1, 1) NOT NULL
            CONSTRAINT PK_samegoal_EvaluationTeamReport PRIMARY KEY NONCLUSTERED,
        personID int NOT NULL,
        meetingDate date NOT NULL,
        evaluationType nvarchar(20) NULL,
        referralDate date NULL,
        consentDate date NULL,
        consentOutcome nvarchar(20) NULL,
        primaryDisability nvarchar(50) NULL,
        nonCompliance nvarchar(20) NULL,
        locked bit NOT NULL,
        retiredDate date NULL,
        modifiedDate datetime2(0) NOT NULL,
        CONSTRAINT UQ_samegoal_EvaluationTeamReport UNIQUE CLUSTERED (personID, meetingDate)
    );
GO

IF OBJECT_ID(N'samegoal.SpecialEdDate') IS NULL
    CREATE TABLE samegoal.SpecialEdDate (
        specialEdDateID int IDENTITY (1, 1) NOT NULL
            CONSTRAINT PK_samegoal_SpecialEdDate PRIMARY KEY NONCLUSTERED,
        personID int NOT NULL,
        eventType nvarchar(20) COLLATE Latin1_General_BIN2 NOT NULL,
        eventDate date NOT NULL,
        outcome nvarchar(20) NULL,
        outcomeBeginDate date NULL,
        outcomeEndDate date NULL,
        nonCompliance nvarchar(20) NULL,
        retiredDate date NULL,
        modifiedDate datetime2(0) NOT NULL,
        CONSTRAINT UQ_samegoal_SpecialEdDate UNIQUE CLUSTERED (personID, eventType, eventDate),
        CONSTRAINT CK_samegoal_SpecialEdDate_dates CHECK (outcomeEndDate >= outcomeBeginDate)
    );
GO

IF OBJECT_ID(N'samegoal.ProgramFlag') IS NULL
    CREATE TABLE samegoal.ProgramFlag (
        programFlagID int IDENTITY (1, 1) NOT NULL
            CONSTRAINT PK_samegoal_ProgramFlag PRIMARY KEY NONCLUSTERED,
        personID int NOT NULL,
        flag nvarchar(50) COLLATE Latin1_General_BIN2 NOT NULL,
        startDate date NOT NULL,
        endDate date NULL,
        -- 1: dbo.sg_cleanup set endDate, because the student left. SameGoal knows nothing of that
        -- date, so the comparison must see the flag as open, or the two would undo each other's
        -- work every night.
        endedByExit bit NOT NULL,
        retiredDate date NULL,
        modifiedDate datetime2(0) NOT NULL,
        CONSTRAINT UQ_samegoal_ProgramFlag UNIQUE CLUSTERED (personID, flag, startDate),
        CONSTRAINT CK_samegoal_ProgramFlag_dates CHECK (endDate >= startDate)
    );
GO

----------------------------------------------------------------------------------------------------
-- 4. Helpers
--
-- A function or procedure is first made empty where it is missing, then altered to what it is:
-- ALTER keeps the permissions that were granted on it, DROP and CREATE would lose them.
----------------------------------------------------------------------------------------------------

IF OBJECT_ID(N'samegoal.to_date', N'FN') IS NULL
    EXEC (
        N'CREATE FUNCTION samegoal.to_date (@text nvarchar(4000)) RETURNS date '
        + N'AS BEGIN RETURN NULL; END;'
    );
GO

-- The date that @text writes as YYYY-MM-DD; NULL for anything else. The pattern is there because
-- TRY_CONVERT alone takes other ways of writing a date, too.
ALTER FUNCTION samegoal.to_date (@text nvarchar(4000))
RETURNS date
WITH SCHEMABINDING
AS
BEGIN
    RETURN CASE
        WHEN @text LIKE N'[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]'
            THEN TRY_CONVERT(date, @text, 120)
    END;
END;
GO

IF OBJECT_ID(N'samegoal.to_person_id', N'FN') IS NULL
    EXEC (
        N'CREATE FUNCTION samegoal.to_person_id (@studentNumber nvarchar(4000)) RETURNS int '
        + N'AS BEGIN RETURN NULL; END;'
    );
GO

-- The personID of the one student who has this number; NULL when none or several have it.
ALTER FUNCTION samegoal.to_person_id (@studentNumber nvarchar(4000))
RETURNS int
AS
BEGIN
    DECLARE @personID int;

    -- The first condition can use an index in the column's own collation; the second is exact.
    SELECT @personID = CASE WHEN MIN(personID) = MAX(personID) THEN MIN(personID) END
    FROM samegoal.Student
    WHERE studentNumber = @studentNumber
        AND studentNumber COLLATE Latin1_General_BIN2 = @studentNumber;

    RETURN @personID;
END;
GO

IF OBJECT_ID(N'samegoal.fail', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE samegoal.fail AS SELECT 1;');
GO

-- Throws error 50001, "<record> of student <number>, <key>: <problem>". THROW and not RAISERROR,
-- because THROW also ends the procedure that called this one.
ALTER PROCEDURE samegoal.fail
    @record nvarchar(100),
    @studentNumber nvarchar(4000),
    @key nvarchar(4000),
    @problem nvarchar(4000)
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @message nvarchar(2048) = @record
        + N' of student ' + ISNULL(LEFT(@studentNumber, 40), N'(no number)')
        + N', ' + ISNULL(LEFT(@key, 100), N'(no key)')
        + N': ' + LEFT(@problem, 700);

    -- THROW reads a per cent sign as the start of a placeholder.
    SET @message = REPLACE(@message, N'%', N'%%');

    THROW 50001, @message, 1;
END;
GO

----------------------------------------------------------------------------------------------------
-- 5. IEPs (iep.csv; key: studentNumber, startDate)
----------------------------------------------------------------------------------------------------

IF OBJECT_ID(N'dbo.sg_iep_upsert', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_iep_upsert AS SELECT 1;');
GO

-- Makes the IEP what the parameters say, and locked. UPDATE first, INSERT if it touched no row; the
-- UPDATE touches none either when the row already matches, so the INSERT looks once more itself.
-- UPDLOCK and HOLDLOCK keep others off the key, even one that is not there yet, until the caller's
-- transaction ends.
ALTER PROCEDURE dbo.sg_iep_upsert
    @studentNumber nvarchar(4000),
    @startDate nvarchar(4000),
    @endDate nvarchar(4000),
    @meetingDate nvarchar(4000),
    @meetingType nvarchar(4000),
    @primaryDisability nvarchar(4000),
    @placement nvarchar(4000),
    @extendedSchoolYear nvarchar(4000),
    @specialTransportation nvarchar(4000),
    @alternateAssessment nvarchar(4000),
    @locked nvarchar(4000) = N'1'
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @start date = samegoal.to_date(@startDate);
    DECLARE @end date = samegoal.to_date(@endDate);
    DECLARE @meeting date = samegoal.to_date(@meetingDate);
    DECLARE @esy bit = TRY_CONVERT(bit, @extendedSchoolYear);
    DECLARE @transport bit = TRY_CONVERT(bit, @specialTransportation);
    DECLARE @alternate bit = TRY_CONVERT(bit, @alternateAssessment);

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @start IS NULL THEN N'startDate is not a date (YYYY-MM-DD)'
        WHEN @endDate IS NOT NULL AND @end IS NULL THEN N'endDate is not a date (YYYY-MM-DD)'
        WHEN @end < @start THEN N'endDate lies before startDate'
        WHEN @meetingDate IS NOT NULL AND @meeting IS NULL
            THEN N'meetingDate is not a date (YYYY-MM-DD)'
        WHEN LEN(@meetingType) > 20 THEN N'meetingType is longer than 20 characters'
        WHEN LEN(@primaryDisability) > 50 THEN N'primaryDisability is longer than 50 characters'
        WHEN LEN(@placement) > 50 THEN N'placement is longer than 50 characters'
        WHEN @extendedSchoolYear NOT IN (N'0', N'1') THEN N'extendedSchoolYear is not 0 or 1'
        WHEN @specialTransportation NOT IN (N'0', N'1') THEN N'specialTransportation is not 0 or 1'
        WHEN @alternateAssessment NOT IN (N'0', N'1') THEN N'alternateAssessment is not 0 or 1'
        WHEN ISNULL(@locked, N'') <> N'1' THEN N'locked is not 1: a completed document is locked'
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'IEP', @studentNumber, @startDate, @problem;

    BEGIN TRY
        UPDATE samegoal.IEP WITH (UPDLOCK, HOLDLOCK)
        SET
            endDate = @end,
            meetingDate = @meeting,
            meetingType = @meetingType,
            primaryDisability = @primaryDisability,
            placement = @placement,
            extendedSchoolYear = @esy,
            specialTransportation = @transport,
            alternateAssessment = @alternate,
            locked = 1,
            retiredDate = NULL,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND startDate = @start
            AND (
                retiredDate IS NOT NULL
                OR EXISTS (
                    SELECT
                        endDate,
                        meetingDate,
                        meetingType COLLATE Latin1_General_BIN2,
                        primaryDisability COLLATE Latin1_General_BIN2,
                        placement COLLATE Latin1_General_BIN2,
                        extendedSchoolYear,
                        specialTransportation,
                        alternateAssessment,
                        locked
                    EXCEPT
                    SELECT
                        @end,
                        @meeting,
                        @meetingType,
                        @primaryDisability,
                        @placement,
                        @esy,
                        @transport,
                        @alternate,
                        CAST(1 AS bit)
                )
            );

        IF @@ROWCOUNT = 0
            INSERT INTO samegoal.IEP (
                personID,
                startDate,
                endDate,
                meetingDate,
                meetingType,
                primaryDisability,
                placement,
                extendedSchoolYear,
                specialTransportation,
                alternateAssessment,
                locked,
                modifiedDate
            )
            SELECT
                @personID,
                @start,
                @end,
                @meeting,
                @meetingType,
                @primaryDisability,
                @placement,
                @esy,
                @transport,
                @alternate,
                1,
                SYSDATETIME()
            WHERE NOT EXISTS (
                SELECT 1
                FROM samegoal.IEP WITH (UPDLOCK, HOLDLOCK)
                WHERE personID = @personID
                    AND startDate = @start
            );
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'IEP', @studentNumber, @startDate, @problem;
    END CATCH;
END;
GO

IF OBJECT_ID(N'dbo.sg_iep_delete', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_iep_delete AS SELECT 1;');
GO

-- Retires the IEP. A call for one that is not there, or is retired already, changes nothing.
ALTER PROCEDURE dbo.sg_iep_delete
    @studentNumber nvarchar(4000),
    @startDate nvarchar(4000)
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @start date = samegoal.to_date(@startDate);
    DECLARE @today date = SYSDATETIME();

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @start IS NULL THEN N'startDate is not a date (YYYY-MM-DD)'
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'IEP', @studentNumber, @startDate, @problem;

    BEGIN TRY
        UPDATE samegoal.IEP
        SET
            retiredDate = @today,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND startDate = @start
            AND retiredDate IS NULL;
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'IEP', @studentNumber, @startDate, @problem;
    END CATCH;
END;
GO

----------------------------------------------------------------------------------------------------
-- 6. Services plans (services_plan.csv; key: studentNumber, startDate)
----------------------------------------------------------------------------------------------------

IF OBJECT_ID(N'dbo.sg_services_plan_upsert', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_services_plan_upsert AS SELECT 1;');
GO

-- Like dbo.sg_iep_upsert.
ALTER PROCEDURE dbo.sg_services_plan_upsert
    @studentNumber nvarchar(4000),
    @startDate nvarchar(4000),
    @endDate nvarchar(4000),
    @meetingDate nvarchar(4000),
    @primaryDisability nvarchar(4000),
    @servingSchool nvarchar(4000),
    @specialTransportation nvarchar(4000),
    @locked nvarchar(4000) = N'1'
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @start date = samegoal.to_date(@startDate);
    DECLARE @end date = samegoal.to_date(@endDate);
    DECLARE @meeting date = samegoal.to_date(@meetingDate);
    DECLARE @transport bit = TRY_CONVERT(bit, @specialTransportation);

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @start IS NULL THEN N'startDate is not a date (YYYY-MM-DD)'
        WHEN @endDate IS NOT NULL AND @end IS NULL THEN N'endDate is not a date (YYYY-MM-DD)'
        WHEN @end < @start THEN N'endDate lies before startDate'
        WHEN @meetingDate IS NOT NULL AND @meeting IS NULL
            THEN N'meetingDate is not a date (YYYY-MM-DD)'
        WHEN LEN(@primaryDisability) > 50 THEN N'primaryDisability is longer than 50 characters'
        WHEN LEN(@servingSchool) > 100 THEN N'servingSchool is longer than 100 characters'
        WHEN @specialTransportation NOT IN (N'0', N'1') THEN N'specialTransportation is not 0 or 1'
        WHEN ISNULL(@locked, N'') <> N'1' THEN N'locked is not 1: a completed document is locked'
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'services plan', @studentNumber, @startDate, @problem;

    BEGIN TRY
        UPDATE samegoal.ServicesPlan WITH (UPDLOCK, HOLDLOCK)
        SET
            endDate = @end,
            meetingDate = @meeting,
            primaryDisability = @primaryDisability,
            servingSchool = @servingSchool,
            specialTransportation = @transport,
            locked = 1,
            retiredDate = NULL,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND startDate = @start
            AND (
                retiredDate IS NOT NULL
                OR EXISTS (
                    SELECT
                        endDate,
                        meetingDate,
                        primaryDisability COLLATE Latin1_General_BIN2,
                        servingSchool COLLATE Latin1_General_BIN2,
                        specialTransportation,
                        locked
                    EXCEPT
                    SELECT
                        @end,
                        @meeting,
                        @primaryDisability,
                        @servingSchool,
                        @transport,
                        CAST(1 AS bit)
                )
            );

        IF @@ROWCOUNT = 0
            INSERT INTO samegoal.ServicesPlan (
                personID,
                startDate,
                endDate,
                meetingDate,
                primaryDisability,
                servingSchool,
                specialTransportation,
                locked,
                modifiedDate
            )
            SELECT
                @personID,
                @start,
                @end,
                @meeting,
                @primaryDisability,
                @servingSchool,
                @transport,
                1,
                SYSDATETIME()
            WHERE NOT EXISTS (
                SELECT 1
                FROM samegoal.ServicesPlan WITH (UPDLOCK, HOLDLOCK)
                WHERE personID = @personID
                    AND startDate = @start
            );
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'services plan', @studentNumber, @startDate, @problem;
    END CATCH;
END;
GO

IF OBJECT_ID(N'dbo.sg_services_plan_delete', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_services_plan_delete AS SELECT 1;');
GO

-- Like dbo.sg_iep_delete.
ALTER PROCEDURE dbo.sg_services_plan_delete
    @studentNumber nvarchar(4000),
    @startDate nvarchar(4000)
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @start date = samegoal.to_date(@startDate);
    DECLARE @today date = SYSDATETIME();

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @start IS NULL THEN N'startDate is not a date (YYYY-MM-DD)'
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'services plan', @studentNumber, @startDate, @problem;

    BEGIN TRY
        UPDATE samegoal.ServicesPlan
        SET
            retiredDate = @today,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND startDate = @start
            AND retiredDate IS NULL;
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'services plan', @studentNumber, @startDate, @problem;
    END CATCH;
END;
GO

----------------------------------------------------------------------------------------------------
-- 7. Evaluation team reports (evaluation_team_report.csv; key: studentNumber, meetingDate)
----------------------------------------------------------------------------------------------------

IF OBJECT_ID(N'dbo.sg_evaluation_team_report_upsert', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_evaluation_team_report_upsert AS SELECT 1;');
GO

-- Like dbo.sg_iep_upsert.
ALTER PROCEDURE dbo.sg_evaluation_team_report_upsert
    @studentNumber nvarchar(4000),
    @meetingDate nvarchar(4000),
    @evaluationType nvarchar(4000),
    @referralDate nvarchar(4000),
    @consentDate nvarchar(4000),
    @consentOutcome nvarchar(4000),
    @primaryDisability nvarchar(4000),
    @nonCompliance nvarchar(4000),
    @locked nvarchar(4000) = N'1'
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @meeting date = samegoal.to_date(@meetingDate);
    DECLARE @referral date = samegoal.to_date(@referralDate);
    DECLARE @consent date = samegoal.to_date(@consentDate);

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @meeting IS NULL THEN N'meetingDate is not a date (YYYY-MM-DD)'
        WHEN LEN(@evaluationType) > 20 THEN N'evaluationType is longer than 20 characters'
        WHEN @referralDate IS NOT NULL AND @referral IS NULL
            THEN N'referralDate is not a date (YYYY-MM-DD)'
        WHEN @consentDate IS NOT NULL AND @consent IS NULL
            THEN N'consentDate is not a date (YYYY-MM-DD)'
        WHEN LEN(@consentOutcome) > 20 THEN N'consentOutcome is longer than 20 characters'
        WHEN LEN(@primaryDisability) > 50 THEN N'primaryDisability is longer than 50 characters'
        WHEN LEN(@nonCompliance) > 20 THEN N'nonCompliance is longer than 20 characters'
        WHEN ISNULL(@locked, N'') <> N'1' THEN N'locked is not 1: a completed document is locked'
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'evaluation team report', @studentNumber, @meetingDate, @problem;

    BEGIN TRY
        UPDATE samegoal.EvaluationTeamReport WITH (UPDLOCK, HOLDLOCK)
        SET
            evaluationType = @evaluationType,
            referralDate = @referral,
            consentDate = @consent,
            consentOutcome = @consentOutcome,
            primaryDisability = @primaryDisability,
            nonCompliance = @nonCompliance,
            locked = 1,
            retiredDate = NULL,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND meetingDate = @meeting
            AND (
                retiredDate IS NOT NULL
                OR EXISTS (
                    SELECT
                        evaluationType COLLATE Latin1_General_BIN2,
                        referralDate,
                        consentDate,
                        consentOutcome COLLATE Latin1_General_BIN2,
                        primaryDisability COLLATE Latin1_General_BIN2,
                        nonCompliance COLLATE Latin1_General_BIN2,
                        locked
                    EXCEPT
                    SELECT
                        @evaluationType,
                        @referral,
                        @consent,
                        @consentOutcome,
                        @primaryDisability,
                        @nonCompliance,
                        CAST(1 AS bit)
                )
            );

        IF @@ROWCOUNT = 0
            INSERT INTO samegoal.EvaluationTeamReport (
                personID,
                meetingDate,
                evaluationType,
                referralDate,
                consentDate,
                consentOutcome,
                primaryDisability,
                nonCompliance,
                locked,
                modifiedDate
            )
            SELECT
                @personID,
                @meeting,
                @evaluationType,
                @referral,
                @consent,
                @consentOutcome,
                @primaryDisability,
                @nonCompliance,
                1,
                SYSDATETIME()
            WHERE NOT EXISTS (
                SELECT 1
                FROM samegoal.EvaluationTeamReport WITH (UPDLOCK, HOLDLOCK)
                WHERE personID = @personID
                    AND meetingDate = @meeting
            );
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'evaluation team report', @studentNumber, @meetingDate, @problem;
    END CATCH;
END;
GO

IF OBJECT_ID(N'dbo.sg_evaluation_team_report_delete', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_evaluation_team_report_delete AS SELECT 1;');
GO

-- Like dbo.sg_iep_delete.
ALTER PROCEDURE dbo.sg_evaluation_team_report_delete
    @studentNumber nvarchar(4000),
    @meetingDate nvarchar(4000)
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @meeting date = samegoal.to_date(@meetingDate);
    DECLARE @today date = SYSDATETIME();

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @meeting IS NULL THEN N'meetingDate is not a date (YYYY-MM-DD)'
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'evaluation team report', @studentNumber, @meetingDate, @problem;

    BEGIN TRY
        UPDATE samegoal.EvaluationTeamReport
        SET
            retiredDate = @today,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND meetingDate = @meeting
            AND retiredDate IS NULL;
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'evaluation team report', @studentNumber, @meetingDate, @problem;
    END CATCH;
END;
GO

----------------------------------------------------------------------------------------------------
-- 8. Special education dates (special_ed_dates.csv; key: studentNumber, eventType, eventDate)
----------------------------------------------------------------------------------------------------

IF OBJECT_ID(N'dbo.sg_special_ed_date_upsert', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_special_ed_date_upsert AS SELECT 1;');
GO

-- Like dbo.sg_iep_upsert.
ALTER PROCEDURE dbo.sg_special_ed_date_upsert
    @studentNumber nvarchar(4000),
    @eventType nvarchar(4000),
    @eventDate nvarchar(4000),
    @outcome nvarchar(4000),
    @outcomeBeginDate nvarchar(4000),
    @outcomeEndDate nvarchar(4000),
    @nonCompliance nvarchar(4000)
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @event date = samegoal.to_date(@eventDate);
    DECLARE @begin date = samegoal.to_date(@outcomeBeginDate);
    DECLARE @end date = samegoal.to_date(@outcomeEndDate);
    DECLARE @key nvarchar(4000) = CONCAT(@eventType, N' ', @eventDate);

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @eventType IS NULL THEN N'eventType is missing'
        WHEN LEN(@eventType) > 20 THEN N'eventType is longer than 20 characters'
        WHEN @event IS NULL THEN N'eventDate is not a date (YYYY-MM-DD)'
        WHEN LEN(@outcome) > 20 THEN N'outcome is longer than 20 characters'
        WHEN @outcomeBeginDate IS NOT NULL AND @begin IS NULL
            THEN N'outcomeBeginDate is not a date (YYYY-MM-DD)'
        WHEN @outcomeEndDate IS NOT NULL AND @end IS NULL
            THEN N'outcomeEndDate is not a date (YYYY-MM-DD)'
        WHEN @end < @begin THEN N'outcomeEndDate lies before outcomeBeginDate'
        WHEN LEN(@nonCompliance) > 20 THEN N'nonCompliance is longer than 20 characters'
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'special education date', @studentNumber, @key, @problem;

    BEGIN TRY
        UPDATE samegoal.SpecialEdDate WITH (UPDLOCK, HOLDLOCK)
        SET
            outcome = @outcome,
            outcomeBeginDate = @begin,
            outcomeEndDate = @end,
            nonCompliance = @nonCompliance,
            retiredDate = NULL,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND eventType COLLATE Latin1_General_BIN2 = @eventType
            AND eventDate = @event
            AND (
                retiredDate IS NOT NULL
                OR EXISTS (
                    SELECT
                        outcome COLLATE Latin1_General_BIN2,
                        outcomeBeginDate,
                        outcomeEndDate,
                        nonCompliance COLLATE Latin1_General_BIN2
                    EXCEPT
                    SELECT
                        @outcome,
                        @begin,
                        @end,
                        @nonCompliance
                )
            );

        IF @@ROWCOUNT = 0
            INSERT INTO samegoal.SpecialEdDate (
                personID,
                eventType,
                eventDate,
                outcome,
                outcomeBeginDate,
                outcomeEndDate,
                nonCompliance,
                modifiedDate
            )
            SELECT
                @personID,
                @eventType,
                @event,
                @outcome,
                @begin,
                @end,
                @nonCompliance,
                SYSDATETIME()
            WHERE NOT EXISTS (
                SELECT 1
                FROM samegoal.SpecialEdDate WITH (UPDLOCK, HOLDLOCK)
                WHERE personID = @personID
                    AND eventType COLLATE Latin1_General_BIN2 = @eventType
                    AND eventDate = @event
            );
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'special education date', @studentNumber, @key, @problem;
    END CATCH;
END;
GO

IF OBJECT_ID(N'dbo.sg_special_ed_date_delete', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_special_ed_date_delete AS SELECT 1;');
GO

-- Like dbo.sg_iep_delete.
ALTER PROCEDURE dbo.sg_special_ed_date_delete
    @studentNumber nvarchar(4000),
    @eventType nvarchar(4000),
    @eventDate nvarchar(4000)
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @event date = samegoal.to_date(@eventDate);
    DECLARE @today date = SYSDATETIME();
    DECLARE @key nvarchar(4000) = CONCAT(@eventType, N' ', @eventDate);

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @eventType IS NULL THEN N'eventType is missing'
        WHEN @event IS NULL THEN N'eventDate is not a date (YYYY-MM-DD)'
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'special education date', @studentNumber, @key, @problem;

    BEGIN TRY
        UPDATE samegoal.SpecialEdDate
        SET
            retiredDate = @today,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND eventType COLLATE Latin1_General_BIN2 = @eventType
            AND eventDate = @event
            AND retiredDate IS NULL;
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'special education date', @studentNumber, @key, @problem;
    END CATCH;
END;
GO

----------------------------------------------------------------------------------------------------
-- 9. Program flags (program_flags.csv; key: studentNumber, flag, startDate)
----------------------------------------------------------------------------------------------------

IF OBJECT_ID(N'dbo.sg_program_flag_upsert', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_program_flag_upsert AS SELECT 1;');
GO

-- A flag that dbo.sg_cleanup ended counts as open here, as it does in the query of config.xml.
ALTER PROCEDURE dbo.sg_program_flag_upsert
    @studentNumber nvarchar(4000),
    @flag nvarchar(4000),
    @startDate nvarchar(4000),
    @endDate nvarchar(4000)
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @start date = samegoal.to_date(@startDate);
    DECLARE @end date = samegoal.to_date(@endDate);
    DECLARE @key nvarchar(4000) = CONCAT(@flag, N' ', @startDate);

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @flag IS NULL THEN N'flag is missing'
        WHEN LEN(@flag) > 50 THEN N'flag is longer than 50 characters'
        WHEN @start IS NULL THEN N'startDate is not a date (YYYY-MM-DD)'
        WHEN @endDate IS NOT NULL AND @end IS NULL THEN N'endDate is not a date (YYYY-MM-DD)'
        WHEN @end < @start THEN N'endDate lies before startDate'
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'program flag', @studentNumber, @key, @problem;

    BEGIN TRY
        UPDATE samegoal.ProgramFlag WITH (UPDLOCK, HOLDLOCK)
        SET
            endDate = @end,
            endedByExit = 0,
            retiredDate = NULL,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND flag COLLATE Latin1_General_BIN2 = @flag
            AND startDate = @start
            AND (
                retiredDate IS NOT NULL
                OR EXISTS (
                    SELECT CASE WHEN endedByExit = 0 THEN endDate END
                    EXCEPT
                    SELECT @end
                )
            );

        IF @@ROWCOUNT = 0
            INSERT INTO samegoal.ProgramFlag (
                personID,
                flag,
                startDate,
                endDate,
                endedByExit,
                modifiedDate
            )
            SELECT
                @personID,
                @flag,
                @start,
                @end,
                0,
                SYSDATETIME()
            WHERE NOT EXISTS (
                SELECT 1
                FROM samegoal.ProgramFlag WITH (UPDLOCK, HOLDLOCK)
                WHERE personID = @personID
                    AND flag COLLATE Latin1_General_BIN2 = @flag
                    AND startDate = @start
            );
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'program flag', @studentNumber, @key, @problem;
    END CATCH;
END;
GO

IF OBJECT_ID(N'dbo.sg_program_flag_delete', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_program_flag_delete AS SELECT 1;');
GO

-- Retires the flag and ends it: today, or on the day it starts if that is still to come. An earlier
-- endDate stays.
ALTER PROCEDURE dbo.sg_program_flag_delete
    @studentNumber nvarchar(4000),
    @flag nvarchar(4000),
    @startDate nvarchar(4000)
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @start date = samegoal.to_date(@startDate);
    DECLARE @today date = SYSDATETIME();
    DECLARE @key nvarchar(4000) = CONCAT(@flag, N' ', @startDate);

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @flag IS NULL THEN N'flag is missing'
        WHEN @start IS NULL THEN N'startDate is not a date (YYYY-MM-DD)'
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'program flag', @studentNumber, @key, @problem;

    BEGIN TRY
        UPDATE samegoal.ProgramFlag
        SET
            endDate = CASE
                WHEN endDate < @today THEN endDate
                WHEN startDate > @today THEN startDate
                ELSE @today
            END,
            retiredDate = @today,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND flag COLLATE Latin1_General_BIN2 = @flag
            AND startDate = @start
            AND retiredDate IS NULL;
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'program flag', @studentNumber, @key, @problem;
    END CATCH;
END;
GO

----------------------------------------------------------------------------------------------------
-- 10. Clean-up (the first statement of the Upload element)
----------------------------------------------------------------------------------------------------

IF OBJECT_ID(N'dbo.sg_cleanup', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_cleanup AS SELECT 1;');
GO

-- Ends the flags that SameGoal leaves open for students who have left the district, on the day they
-- left; moves that day when the SIS corrects it; opens the flag again when the student comes back.
-- A second call changes nothing. Flags that SameGoal itself has ended are left alone.
ALTER PROCEDURE dbo.sg_cleanup
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @today date = SYSDATETIME();
    DECLARE @change TABLE (
        programFlagID int NOT NULL PRIMARY KEY,
        endDate date NULL
    );

    -- In two steps, because a view with INSTEAD OF triggers cannot be updated through a join.
    INSERT INTO @change (programFlagID, endDate)
    SELECT f.programFlagID, wanted.endDate
    FROM samegoal.ProgramFlag AS f
        INNER JOIN samegoal.Student AS s ON s.personID = f.personID
        CROSS APPLY (
            SELECT CASE
                WHEN s.exitDate > @today THEN NULL
                WHEN s.exitDate < f.startDate THEN f.startDate
                ELSE s.exitDate
            END AS endDate
        ) AS wanted
    WHERE f.retiredDate IS NULL
        AND (f.endDate IS NULL OR f.endedByExit = 1)
        AND EXISTS (SELECT f.endDate EXCEPT SELECT wanted.endDate);

    UPDATE f
    SET
        endDate = (SELECT c.endDate FROM @change AS c WHERE c.programFlagID = f.programFlagID),
        endedByExit = (
            SELECT CASE WHEN c.endDate IS NULL THEN 0 ELSE 1 END
            FROM @change AS c
            WHERE c.programFlagID = f.programFlagID
        ),
        modifiedDate = SYSDATETIME()
    FROM samegoal.ProgramFlag AS f
    WHERE f.programFlagID IN (SELECT c.programFlagID FROM @change AS c);
END;
GO

----------------------------------------------------------------------------------------------------
-- 11. Permissions
--
-- The account of the nightly job needs these rights and no others. Remove the leading dashes and
-- put its name, of a Windows account as here or of a SQL login, in place of DISTRICT\sgsync. Where
-- section 2 names a synonym, grant SELECT on the table that it stands for, too.
--
-- IF DATABASE_PRINCIPAL_ID(N'samegoal_service') IS NULL
--     CREATE ROLE samegoal_service AUTHORIZATION dbo;
-- GRANT SELECT ON SCHEMA::samegoal TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_iep_upsert TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_iep_delete TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_services_plan_upsert TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_services_plan_delete TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_evaluation_team_report_upsert TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_evaluation_team_report_delete TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_special_ed_date_upsert TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_special_ed_date_delete TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_program_flag_upsert TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_program_flag_delete TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_cleanup TO samegoal_service;
--
-- IF DATABASE_PRINCIPAL_ID(N'DISTRICT\sgsync') IS NULL
--     CREATE USER [DISTRICT\sgsync] FOR LOGIN [DISTRICT\sgsync];
-- ALTER ROLE samegoal_service ADD MEMBER [DISTRICT\sgsync];
----------------------------------------------------------------------------------------------------

SET NOEXEC OFF;
GO
